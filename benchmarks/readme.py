"""Write the measured numbers into README.md, between <!-- name --> and <!-- /name -->, from benchmarks/results/.

python -m benchmarks.readme
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from benchmarks.environment import RESULTS, ROOT

README = ROOT / "README.md"


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
        f"{measured['environment']['cores']} CPU cores ([demo.json](benchmarks/results/demo.json))."
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
            str(e["bits"]),
            str(e["bits_per_weight"]),
            *(f"{e[effort]['relative_mse']:.5f}" for effort in ("fast", "best")),
        ]
        for e in result("codec_error")["results"]
    ]
    return _table(["bits", "bits/weight", "fast", "best"], rows)


BLOCKS = {"demo": demo, "sizes": sizes, "cost": cost, "codec": codec}


def render(text: str) -> str:
    """README's text with every block made anew."""
    for name, block in BLOCKS.items():
        found = re.compile(rf"(<!-- {name} -->\n).*?(\n<!-- /{name} -->)", re.DOTALL)
        if len(found.findall(text)) != 1:
            raise SystemExit(f"README.md needs exactly one block {name}")
        made = block()
        text = found.sub(lambda match, made=made: match[1] + made + match[2], text)  # type: ignore[misc]
    return text


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def main() -> None:
    README.write_text(render(README.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
