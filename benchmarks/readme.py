"""Write the measured numbers into README.md and docs/, between <!-- name --> and <!-- /name -->, from benchmarks/results/.

python -m benchmarks.readme
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import cpu_report, real_report
from benchmarks.environment import RESULTS, ROOT

README = ROOT / "README.md"
COMPARISON = ROOT / "docs" / "comparison.md"
CPU = ROOT / "docs" / "cpu.md"
ARCHITECTURES = ROOT / "docs" / "architectures.md"


def result(name: str) -> dict[str, Any]:
    """What a benchmark wrote."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def demo() -> str:
    """The demo's table, and what it was measured on."""
    measured = result("demo")
    rows = []
    for v in measured["variants"]:
        kld, match = v.get("kld_nats"), v["exact_match"]
        rows.append(
            [
                v["name"], f"{v['bytes'] / 1e6:.2f}", f"{v['bits_per_weight']:.2f}",
                f"{kld['mean']:.5f} ± {kld['mean_error']:.5f}" if kld else "–", f"{v['perplexity']['value']:.3f}",
                f"{match['share']:.1%}", " – ".join(f"{bound:.1%}" for bound in match["wilson_95"]),
            ]
        )  # fmt: skip
    head = ["variant", "MB", "bits/weight", "KLD against bf16", "perplexity", "exact match", "95 % interval"]
    first = measured["variants"][0]
    return (
        f"{_table(head, rows)}\n\n{first['exact_match']['of']} held-out arithmetic stories of 2 to 4 steps; "
        f"{first['perplexity']['tokens']:,} predicted tokens of held-out text; {measured['seconds']:.0f} s in all on "
        f"{measured['environment']['cores']} CPU cores, begun at a load of {measured['environment']['load_before']} "
        "([demo.json](benchmarks/results/demo.json))."
    )


def sizes() -> str:
    """Plans of the 35 B model."""
    rows = []
    for name, plan in result("plan_sizes")["plans"].items():
        kept, packed = plan["mtp_kept"], plan["mtp_experts_4_bits"]
        gigabytes = [f"{n / 1e9:.2f}" for n in (kept["bytes"], kept["active_bytes_per_token"], packed["bytes"])]
        rows.append([name, gigabytes[0], f"{kept['bits_per_weight']:.2f}", *gigabytes[1:]])
    return _table(["plan", "GB", "bits/weight", "GB per token", "GB, MTP experts at 4 bits"], rows)


def cost() -> str:
    """Memory and time of quantizing."""
    runs = {run["effort"]: run for run in result("quantize_cost")["results"]}
    peak = max(run["peak_gib"] for run in runs.values())
    gigabytes = result("plan_sizes")["source_bytes"] / 1e9
    fast, best = (runs[effort]["seconds_per_gb"] for effort in ("fast", "best"))
    measured = result("quantize_cost")
    size, load = measured["bytes"] / 1e9, measured["environment"]["load_before"]
    seconds = [f"{s / size:.2f}" for s in runs["fast"]["all_seconds"]]
    return (
        f"* **Memory** while quantizing: {peak:.2f} GiB with two processes, torch and all, fused experts of 1 GB included.\n"
        f"* **Time** on two cores: {fast:.1f} s per GB of bf16 with `--effort fast`, {best:.1f} s with the default `best`: "
        f"{gigabytes * fast / 60:.0f} and {gigabytes * best / 60:.0f} minutes for this model, plus its download. "
        f"These are the fastest of {len(seconds)} runs (fast: {', '.join(seconds)}), begun at a load of {load}."
    )


def codec() -> str:
    """Relative squared error on Gaussian weights."""
    rows = [
        [
            f"`{e['format']}`",
            str(e["bits_per_weight"]),
            *(f"{e[effort]['relative_mse']:.5f}" for effort in ("fast", "best")),
        ]
        for e in result("codec_error")["results"]
    ]
    return _table(["format", "bits/weight", "fast", "best"], rows)


def gpu_kernels() -> str:
    """Products of one large matrix, by batch."""
    measured = result("gpu_kernels")
    batches = sorted({row["batch"] for row in measured["rows"] if row["what"] == "bf16 (cuBLAS)"})
    times: dict[str, dict[int, float]] = {}
    for row in measured["rows"]:
        name, kind = row["what"].partition(",")[0], row["what"].partition(", ")[2]
        if (row["rows"], row["inputs"]) == (28672, 4096) and (kind != "float16" or row["batch"] > 16):
            times.setdefault(name, {}).setdefault(row["batch"], row["us"])  # int8 comes first, where it is chosen
    rows = [
        [
            f"**{name}**" if name.endswith(" bits") or name.startswith("trellis") else name,
            *(f"{at[b]:.1f}" if b in at else "–" for b in batches),
        ]
        for name, at in times.items()
        if len(at) > 1
    ]
    blocks = ", ".join(
        f"{e['us']:.0f} ({e['trellis_us']:.0f}) against {e['grouped_mm_bf16_us']:.0f} µs for {e['tokens']} token{'s'[: e['tokens'] > 1]}"
        for e in measured["experts"]
    )
    return (
        f"{_table(['µs, 28672 x 4096, tokens:', *map(str, batches)], rows)}\n\n"
        f"A block of 256 experts, 8 a token (3 and 4 bits, 2048 / 512; in brackets in trellis codes), against bf16 grouped_mm: {blocks}. "
        f"{measured['environment']['device']}, read ceiling {measured['read_ceiling_tb_per_s']} TB/s "
        "([gpu_kernels.json](benchmarks/results/gpu_kernels.json))."
    )


def gpu_decode() -> str:
    """The 35 B model's shape on one card."""
    measured = result("gpu_decode")
    cases = ((1, 32), (1, 4096), (8, 32), (8, 4096))
    models: dict[str, dict[tuple[int, int], dict[str, Any]]] = {}
    for row in [*measured["rows"], *result("gpu_decode_trellis")["rows"]]:
        models.setdefault(row["model"], {}).setdefault((row["batch"], row["context"]), row)
    rows = []
    for name, at in sorted(models.items(), key=lambda model: model[0] != "apex2" and model[0] != "apex2, trellis"):
        first = at[cases[0]]
        speeds = [f"{at[case]['decode_tokens_per_s']:.0f}" if case in at else "–" for case in cases]
        prompts = [f"{at[c]['prefill_tokens_per_s']:.0f}" if c in at else "–" for c in ((1, 32), (1, 2048), (1, 4096))]
        kernels = first["kernels_per_step"] or "–"
        rows.append([name, *speeds, *prompts, f"{max(r['peak_gib'] for r in at.values()):.1f}", str(kernels)])
    head = [
        "tok/s at batch x context:",
        *(f"{b} x {c}" for b, c in cases),
        *(f"prompt of {n}" for n in (32, 2048, 4096)),
        "peak GiB",
        "kernels a step",
    ]
    return (
        f"{_table(head, rows)}\n\n{measured['environment']['device']}, random weights "
        "([gpu_decode.json](benchmarks/results/gpu_decode.json); trellis codes in the places of apex2's codebooks, in which apex2 itself took "
        f"{_tokens(result('gpu_decode_trellis'), 'apex2')} tok/s: [gpu_decode_trellis.json](benchmarks/results/gpu_decode_trellis.json))."
    )


def _tokens(measured: dict[str, Any], model: str) -> str:
    """Tokens a second at batch 1, context 32."""
    found = next(r for r in measured["rows"] if (r["model"], r["batch"], r["context"]) == (model, 1, 32))
    return f"{found['decode_tokens_per_s']:.0f}"


def cpu_decode(name: str = "cpu_decode", root: str = "") -> str:
    """A CPU beside llama.cpp; ``root`` is the way from the page to the repository."""
    measured = result(name)
    tables = "\n\n".join(_table(*made(measured["rows"])) for made in (cpu_report.models, cpu_report.products))
    return f"{tables}\n\n{cpu_report.machine(measured)} ([{name}.json]({root}benchmarks/results/{name}.json))."


def reference_table() -> str:
    """The reference model in every plan and by other quantizers."""
    measured = result("reference_table")
    rows = []
    for row in measured["rows"]:
        if "absent" in row:
            rows.append([row["name"], *["–"] * 6, row["absent"]])
            continue
        match = row["exact_match"]
        low, high = match["wilson_95"]
        rows.append(
            [
                row["name"], f"{row['bytes'] / 1e6:.2f}", f"{row['bits_per_weight']:.2f}", f"{row['share_quantized']:.0%}",
                _thousandths(row["kld_nats"]) if row["share_quantized"] else "–", f"{row['kld_nats']['top1_agreement']:.2%}",
                f"{row['perplexity']['value']:.3f}", f"{match['share']:.1%} ({low:.1%} – {high:.1%})",
            ]
        )  # fmt: skip
    head = [
        "variant", "MB", "bits/weight", "packed", "KLD · 1000 (95 %)", "same top token", "perplexity", "exact match (95 %)",
    ]  # fmt: skip
    return (
        f"{_table(head, rows)}\n\n{measured['sequences']} held-out texts, {measured['tokens']:,} predicted tokens; "
        f"{measured['problems']} problems; {measured['seconds']:.0f} s in all on {measured['environment']['cores']} CPU cores "
        "([reference_table.json](benchmarks/results/reference_table.json))."
    )


def ablation() -> str:
    """Bits by κ, by role and at random, in equal bytes."""
    rows = []
    for row in result("reference_table")["ablation"]:
        dealt, n = row["random_spread"], len(row["random"])
        random = f"{1e3 * dealt['mean']:.3f} ({1e3 * dealt['least']:.3f} – {1e3 * dealt['most']:.3f})"
        role = [_thousandths(row["role"]), f"{row['role_beats_random']} of {n}"] if "role" in row else ["–", "–"]
        less = row.get("kappa_less_role")
        rows.append(
            [
                f"{row['bytes'] / 1e6:.2f} ({row['size_of']})", _thousandths(row["kappa"]), role[0], random,
                _thousandths({"mean": less["value"], **less}, "+") if less else "–",
                f"{row['kappa_beats_random']} of {n}", role[1],
            ]
        )  # fmt: skip
    head = [
        "MB (of)", "κ", "by role", "random: mean (least – most)", "κ less role, paired", "κ below random", "role below random",
    ]  # fmt: skip
    return (
        f"{_table(head, rows)}\n\nKLD · 1000 with 95 % intervals over texts; sizes of a row differ by less than 0.5 %."
    )


def real_model() -> str:
    """Real weights: ours, and the best of the others at like bits."""
    return real_report.headline(result("real_model"))


def real_pairs() -> str:
    """Real weights: plans by measured sensitivity beside what takes the same bytes."""
    return real_report.pairs(result("real_model"), real_report.BESIDE)


def reference_calibrated() -> str:
    """The reference model at 2 and 3 bits, without text and calibrated."""
    measured = result("reference_calibrated")
    rows = []
    for row in measured["rows"]:
        if row["draw"]:
            continue
        same = [r for r in measured["rows"] if all(r[key] == row[key] for key in ("bits", "text", "tokens"))]
        kld, match, less = row["kld_nats"], row["exact_match"], row.get("kld_less_without")
        low, high = match["wilson_95"]
        rows.append(
            [
                str(row["bits"]), f"{row['text']}, {row['tokens']:,} tokens" if row["tokens"] else "none",
                f"{row['bytes'] / 1e6:.2f}", f"{1e3 * kld['mean']:.3f} ± {1e3 * kld['mean_error']:.3f}",
                _thousandths({"mean": less["value"], **less}, "+") if less else "–",
                ", ".join(f"{1e3 * r['kld_nats']['mean']:.3f}" for r in same if r["draw"]) or "–",
                f"{kld['top1_agreement']:.1%}", f"{row['perplexity']['value']:.3f}",
                f"{match['share']:.1%} ({low:.1%} – {high:.1%})",
            ]
        )  # fmt: skip
    head = [
        "bits", "text", "MB", "KLD · 1000 ± s.e.", "less that without text, paired (95 %)", "other draws", "same top token",
        "perplexity", "exact match (95 %)",
    ]  # fmt: skip
    return (
        f"{_table(head, rows)}\n\n{measured['sequences']} held-out texts, {measured['tokens']:,} predicted tokens; "
        f"{measured['problems']} problems ([reference_calibrated.json](../benchmarks/results/reference_calibrated.json))."
    )


def architectures() -> str:
    """What becomes of each architecture, one row each."""
    measured = result("architectures")
    rows = []
    for row in measured["rows"]:
        calibrated = row["calibrated"]
        rows.append(
            [
                f"`{row['model_type']}`", f"{row['share']:.1%}", f"{row['logits']:.1e}", "yes" if row["same_text"] else "no",
                ", ".join(row["runs_as"]), "no" if calibrated else "yes", f"{row['share_for_vllm']:.0%}", "yes" if row["mlx"] else "no",
            ]
        )  # fmt: skip
    head = ["architecture", "packed", "logits", "same text", "runs as", "calibrated", "packed for vLLM", "MLX"]
    about = measured["environment"]
    return (
        f"{_table(head, rows)}\n\ntransformers {about['transformers']}, torch {about['torch']}, kappaquant {about['kappaquant']} "
        "([architectures.json](../benchmarks/results/architectures.json))."
    )


Blocks = Mapping[str, Callable[[], str]]
BLOCKS: Blocks = {
    "demo": demo, "real_model": real_model, "real_pairs": real_pairs, "sizes": sizes, "cost": cost, "codec": codec, "gpu_kernels": gpu_kernels,
    "gpu_decode": gpu_decode, "cpu_decode": cpu_decode, "reference_table": reference_table, "ablation": ablation,
}  # fmt: skip
PAGES: Mapping[Path, Blocks] = {
    README: BLOCKS,
    COMPARISON: {"reference_calibrated": reference_calibrated},
    ARCHITECTURES: {"architectures": architectures},
    CPU: {name: partial(cpu_decode, name, "../") for name in ("cpu_decode_avx512", "cpu_decode_avx2")},
}


def render(text: str, blocks: Blocks = BLOCKS) -> str:
    """A page's text with every block made anew."""
    for name, block in blocks.items():
        found = re.compile(rf"(<!-- {name} -->\n).*?(\n<!-- /{name} -->)", re.DOTALL)
        if len(found.findall(text)) != 1:
            raise SystemExit(f"the page needs exactly one block {name}")
        made = block()
        text = found.sub(lambda match, made=made: match[1] + made + match[2], text)  # type: ignore[misc]
    return text


def _thousandths(found: dict[str, Any], sign: str = "") -> str:
    """A mean with its 95 % interval, times 1000."""
    low, high = (f"{1e3 * bound:{sign}.3f}" for bound in found["interval_95"])
    return f"{1e3 * found['mean']:{sign}.3f} ({low} – {high})"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def main() -> None:
    for page, blocks in PAGES.items():
        page.write_text(render(page.read_text(encoding="utf-8"), blocks), encoding="utf-8")


if __name__ == "__main__":
    main()
