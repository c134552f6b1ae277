// Ids of routed experts come from a router: of another card's experts, of uninitialised rows that a server runs to warm up, or of
// logits that are no numbers, they may be anything.
#pragma once

__device__ __forceinline__ bool is_expert(long long id, int count) { return (unsigned long long)id < (unsigned long long)count; }
