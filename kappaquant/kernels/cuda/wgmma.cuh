// Hopper's warpgroup products, bulk copies and the barriers they meet at (sm_90a); clusters.

typedef unsigned long long u64;

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

__device__ __forceinline__ void barrier_init(u32 barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}

__device__ __forceinline__ void barrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
    asm volatile(
        "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra again;\n}"
        ::"r"(barrier), "r"(parity) : "memory");
}

// the barrier's phase ends when so many bytes have arrived
__device__ __forceinline__ void barrier_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// bytes from global to shared memory, which a barrier expects
__device__ __forceinline__ void bulk_copy(u32 to, const void* from, u32 bytes, u32 barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
        ::"r"(to), "l"(from), "r"(bytes), "r"(barrier) : "memory");
}

// the same to that place in both blocks of a pair, whose barriers at that place both expect the bytes
__device__ __forceinline__ void bulk_copy_to_pair(u32 to, const void* from, u32 bytes, u32 barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], %4;"
        ::"r"(to), "l"(from), "r"(bytes), "r"(barrier), "h"((unsigned short)3) : "memory");
}

// a word on its way to shared memory; copies_wait() of the thread that asked for it before it is there
__device__ __forceinline__ void copy_word(void* to, const void* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
__device__ __forceinline__ void copies_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }

__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}

// the same in two steps, and no memory is made visible
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.aligned;" ::: "memory"); }

// a word, or four floats, at an address of this block's shared memory, in block `rank` of the cluster
__device__ __forceinline__ u32 address_in(u32 address, u32 rank) {
    asm("mapa.shared::cluster.u32 %0, %0, %1;" : "+r"(address) : "r"(rank));
    return address;
}

__device__ __forceinline__ u32 load_remote(u32 address, u32 rank) {
    u32 v;
    asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(v) : "r"(address_in(address, rank)) : "memory");
    return v;
}

// at a barrier of block `rank`
__device__ __forceinline__ void barrier_arrive_in(u32 barrier, u32 rank) {
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(address_in(barrier, rank)) : "memory");
}

__device__ __forceinline__ float4 load_remote_four(u32 address, u32 rank) {
    float4 v;
    asm volatile("ld.shared::cluster.v4.f32 {%0,%1,%2,%3}, [%4];"
        : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(address_in(address, rank)) : "memory");
    return v;
}

// registers that a product reads, or has written, have their values here, wherever the compiler would compute or use them
template <int N, typename T> __device__ __forceinline__ void keep_before(T* registers) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+r"(registers[i])::"memory");
}

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING> __device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Operand B, K-major: 64 inputs of 8 tokens are 1024 bytes that begin at a multiple of 1024, a token's 128 bytes one after
// another, their runs of 16 bytes permuted by exclusive or with the token's number; `along_n` bytes to the next 8 tokens.
// The upper bits of an address say which block of the cluster.
__device__ __forceinline__ u64 swizzled(u32 address, u32 along_n) {
    return (u64)((address & 0x3ffff) >> 4) | 1ull << 16 | (u64)(along_n >> 4) << 32 | 1ull << 62;
}

#define FOUR_OF(kind, d, i) kind(d[i]), kind(d[i + 1]), kind(d[i + 2]), kind(d[i + 3])
#define SIXTEEN_OF(kind, d, i) FOUR_OF(kind, d, i), FOUR_OF(kind, d, i + 4), FOUR_OF(kind, d, i + 8), FOUR_OF(kind, d, i + 12)
#define FOUR(d, i) FOUR_OF("+f", d, i)
#define SIXTEEN(d, i) SIXTEEN_OF("+f", d, i)
#define SIXTEEN_INTEGERS(d, i) SIXTEEN_OF("+r", d, i)
#define A_AND_B(a, b) "r"((a)[0]), "r"((a)[1]), "r"((a)[2]), "r"((a)[3]), "l"(b)

// d += a b: 64 x N sums of 16 products; a is the fragment of mma.m16n8k16 of each warp, float16
template <int N> __device__ __forceinline__ void wgmma(float* d, const u32* a, u64 b) {
    if constexpr (N == 8)
        asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {"
            "%0,%1,%2,%3"
            "}, {%4,%5,%6,%7}, %8, 1, 1, 1, 0;"
            : FOUR(d, 0) : A_AND_B(a, b));
    else if constexpr (N == 16)
        asm volatile("wgmma.mma_async.sync.aligned.m64n16k16.f32.f16.f16 {"
            "%0,%1,%2,%3,%4,%5,%6,%7"
            "}, {%8,%9,%10,%11}, %12, 1, 1, 1, 0;"
            : FOUR(d, 0), FOUR(d, 4) : A_AND_B(a, b));
    else if constexpr (N == 32)
        asm volatile("wgmma.mma_async.sync.aligned.m64n32k16.f32.f16.f16 {"
            "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
            "}, {%16,%17,%18,%19}, %20, 1, 1, 1, 0;"
            : SIXTEEN(d, 0) : A_AND_B(a, b));
    else if constexpr (N == 64)
        asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {"
            "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
            "}, {%32,%33,%34,%35}, %36, 1, 1, 1, 0;"
            : SIXTEEN(d, 0), SIXTEEN(d, 16) : A_AND_B(a, b));
    else if constexpr (N == 128)
        asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {"
            "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
            "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
            "}, {%64,%65,%66,%67}, %68, 1, 1, 1, 0;"
            : SIXTEEN(d, 0), SIXTEEN(d, 16), SIXTEEN(d, 32), SIXTEEN(d, 48) : A_AND_B(a, b));
    else {
        static_assert(N == 256, "tokens of a product: 8, 16, 32, 64, 128 or 256");
        asm volatile("wgmma.mma_async.sync.aligned.m64n256k16.f32.f16.f16 {"
            "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
            "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63,"
            "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,"
            "%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
            "}, {%128,%129,%130,%131}, %132, 1, 1, 1, 0;"
            : SIXTEEN(d, 0), SIXTEEN(d, 16), SIXTEEN(d, 32), SIXTEEN(d, 48), SIXTEEN(d, 64), SIXTEEN(d, 80), SIXTEEN(d, 96), SIXTEEN(d, 112) : A_AND_B(a, b));
    }
}

// d = a b, or d += a b where ADD: 64 x N sums of 32 products; a is the fragment of mma.m16n8k32 of each warp, int8
template <int N, bool ADD> __device__ __forceinline__ void wgmma(int* d, const u32* a, u64 b) {
    if constexpr (N == 32)
        asm volatile("wgmma.mma_async.sync.aligned.m64n32k32.s32.s8.s8 {"
            "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
            "}, {%16,%17,%18,%19}, %20, %21;"
            : SIXTEEN_INTEGERS(d, 0) : A_AND_B(a, b), "n"((int)ADD));
    else if constexpr (N == 64)
        asm volatile("wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8 {"
            "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
            "}, {%32,%33,%34,%35}, %36, %37;"
            : SIXTEEN_INTEGERS(d, 0), SIXTEEN_INTEGERS(d, 16) : A_AND_B(a, b), "n"((int)ADD));
    else {
        static_assert(N == 128, "tokens of an int8 product: 32, 64 or 128");
        asm volatile("wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 {"
            "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
            "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
            "}, {%64,%65,%66,%67}, %68, %69;"
            : SIXTEEN_INTEGERS(d, 0), SIXTEEN_INTEGERS(d, 16), SIXTEEN_INTEGERS(d, 32), SIXTEEN_INTEGERS(d, 48) : A_AND_B(a, b), "n"((int)ADD));
    }
}

#undef FOUR_OF
#undef SIXTEEN_OF
#undef FOUR
#undef SIXTEEN
#undef SIXTEEN_INTEGERS
#undef A_AND_B
