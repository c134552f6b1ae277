"""Which OpenAI-compatible server runs a checkpoint here, why, and the command that starts it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from kappaquant.checkpoints.checkpoint import Checkpoint
from kappaquant.checkpoints.open import open_checkpoint
from kappaquant.errors import UnsupportedError

HOST, PORT = "127.0.0.1", 8000

# transformers' own command line, in a process that knows kappaquant checkpoints
_TRANSFORMERS = "import kappaquant; from transformers.cli.transformers import app; app()"
_MLX = "import sys; from kappaquant.engines.mlx import serve; serve(sys.argv[1], sys.argv[2], int(sys.argv[3]))"


@dataclass(frozen=True)
class Server:
    """One way to serve a checkpoint.

    Attributes:
        engine: "vllm", "transformers" or "mlx".
        why: the reason for it, and what it does not do of what was asked, one sentence each.
        command: the process to start, program first.
    """

    engine: str
    why: tuple[str, ...]
    command: tuple[str, ...]


def choose(
    checkpoint: str | Path,
    engine: str | None = None,
    *,
    host: str = HOST,
    port: int = PORT,
    context: int | None = None,
    options: Sequence[str] = (),
) -> Server:
    """The server for a checkpoint: vLLM if it is installed, else MLX on a Mac that has mlx_lm, else transformers.

    Args:
        engine: take this one of ``ENGINES`` and no other.
        context: tokens of prompt and answer together, at most; default what the model allows.
        options: further command line options, handed to the engine as they are.

    Raises:
        FormatError: the checkpoint is malformed.
        UnsupportedError: the engine is unknown, not installed, or does not serve this format; or ``port`` or ``context`` is out
            of range.
    """
    if engine is not None and engine not in ENGINES:
        raise UnsupportedError(f"engine {engine!r}: must be one of {', '.join(ENGINES)}")
    if not 0 < port < 65536:
        raise UnsupportedError(f"port {port}: must be from 1 to 65535")
    if context is not None and context < 1:
        raise UnsupportedError(f"context {context}: must be at least one token")
    opened = open_checkpoint(checkpoint)
    reasons = {name: refusal(opened) for name, (refusal, _) in ENGINES.items()}
    if engine is None:
        if sys.platform != "darwin":
            reasons["mlx"] = "MLX is for Macs; --mlx tries it all the same"
        chosen = next((name for name, reason in reasons.items() if reason is None), None)
        if chosen is None:
            listed = "; ".join(f"{name} ({reason})" for name, reason in reasons.items())
            raise UnsupportedError(f"{opened.path}: no server can run it here: {listed}")
        passed = [f"not {name}: {reason}" for name, reason in reasons.items() if reason is not None]
        why = ["the first that can run it here", *passed[: list(reasons).index(chosen)]]
    else:
        chosen, why = engine, ["asked for"]
        if reasons[engine] is not None:
            raise UnsupportedError(f"{opened.path}: {engine} cannot serve it: {reasons[engine]}")
    command, unmet = ENGINES[chosen][1](opened.path, host, port, context)
    if options and chosen == "mlx":
        raise UnsupportedError(f"{' '.join(options)}: the MLX server takes no further options here")
    # -P: modules come from the environment, not from the folder the command is given in
    return Server(chosen, (*why, *unmet), (sys.executable, "-P", *command, *options))


Command = tuple[list[str], list[str]]  # arguments of the interpreter, and what of the request they leave out


def _vllm_refusal(checkpoint: Checkpoint) -> str | None:
    if checkpoint.container.needs_conversion:
        return _convert_first(checkpoint)
    return None if find_spec("vllm") else "vLLM is not installed"


def _vllm_command(path: Path, host: str, port: int, context: int | None) -> Command:
    limit = [] if context is None else ["--max-model-len", str(context)]
    return ["-m", "vllm.entrypoints.cli.main", "serve", str(path), "--host", host, "--port", str(port), *limit], []


def _mlx_refusal(checkpoint: Checkpoint) -> str | None:
    return None if find_spec("mlx_lm") else "mlx_lm is not installed"


def _mlx_command(path: Path, host: str, port: int, context: int | None) -> Command:
    unmet = [] if context is None else ["mlx_lm's server has no limit of the context; --context is not passed on"]
    return ["-c", _MLX, str(path), host, str(port)], unmet


def _transformers_refusal(checkpoint: Checkpoint) -> str | None:
    if checkpoint.container.needs_conversion:
        return _convert_first(checkpoint)
    missing = [name for name in ("fastapi", "uvicorn", "openai", "accelerate") if not find_spec(name)]
    return f"{', '.join(missing)} not installed: pip install 'transformers[serving]' accelerate" if missing else None


def _transformers_command(path: Path, host: str, port: int, context: int | None) -> Command:
    unmet = [] if context is None else ["transformers serve has no limit of the context; --context is not passed on"]
    return ["-c", _TRANSFORMERS, "serve", str(path), "--host", host, "--port", str(port)], unmet


def _convert_first(checkpoint: Checkpoint) -> str:
    return f"it does not read {checkpoint.container.id}: kappaquant convert makes a v1 checkpoint of the same codes"


# in order of preference: (why not, or None; the command)
ENGINES: dict[str, tuple[Callable[[Checkpoint], str | None], Callable[[Path, str, int, int | None], Command]]] = {
    "vllm": (_vllm_refusal, _vllm_command),
    "mlx": (_mlx_refusal, _mlx_command),
    "transformers": (_transformers_refusal, _transformers_command),
}
