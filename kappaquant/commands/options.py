"""Arguments and options that several commands share."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import Field, fields
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from kappaquant.errors import OutputError, PlanError, RegistrationError
from kappaquant.formats.codebook import AUTO, GroupSize
from kappaquant.formats.signs import check_group_size
from kappaquant.planning.policies.base import Policy
from kappaquant.planning.policies.registry import policies, policy_by_name
from kappaquant.sources.location import cached

if TYPE_CHECKING:
    from kappaquant.checkpoints.checkpoint import Checkpoint

SourceArg = Annotated[
    str, typer.Argument(help="Folder with config.json and safetensors, or a Hub id: owner/name or owner/name@revision.")
]
CheckpointArg = Annotated[
    str,
    typer.Argument(
        help="Quantized checkpoint, kappaquant or tq3_native: folder, or Hub id (owner/name or owner/name@revision)."
    ),
]
OriginalOpt = Annotated[
    str | None, typer.Option("--source", help="Original model (folder or Hub id): shapes for a tq3_native checkpoint.")
]
RevisionOpt = Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub; it is pinned to a commit.")]
GroupOpt = Annotated[
    str, typer.Option(help="Weights per norm: auto (what fits each input axis, at most 128), or 32, 64, 128 or 256.")
]
JobsOpt = Annotated[int | None, typer.Option(help="Worker processes; default one per core, up to 8.")]
DeviceOpt = Annotated[str | None, typer.Option(help="cpu or cuda; default CUDA if there is one.")]
ActivationsOpt = Annotated[
    str,
    typer.Option(
        help="What weights are multiplied by: int8; on NVIDIA GPUs also bf16 (float16 with scales), on CPUs float32, which lose less."
    ),
]
JsonOpt = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
ProfileOpt = Annotated[Path | None, typer.Option(help="Profile written by scan; the kurtosis policy needs it.")]
OutputOpt = Annotated[Path | None, typer.Option("-o", "--output", help="New folder to write.")]
OutputArg = Annotated[Path | None, typer.Argument(help="The same as -o.")]
SetOpt = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help="PATTERN=BITS or PATTERN=FORMAT, e.g. '*.o_proj.weight=4', =t3, =tq4g64; last match wins."
    ),
]
FormatsOpt = Annotated[
    str | None,
    typer.Option(
        help="Kinds of formats: k (codebooks), t (trellis codes of 2 to 4 bits: less error in the same bytes), or k,t; by evidence all "
        "that it has, else k, unless given."
    ),
]
FuseOpt = Annotated[
    bool,
    typer.Option(
        "--fuse-legal",
        "--fuse",
        help="Raise q/k/v, gate/up and what else serving engines fuse to the most bits among them.",
    ),
]


def in_checkpoint(folder: Path, name: str, option: str) -> Path:
    """A file to write in a checkpoint. Raises OutputError where that is a snapshot of the Hub's cache."""
    if cached(folder):
        raise OutputError(f"{folder}: lies in the Hub's cache, where nothing is written; give {option} FILE for {name}")
    return folder / name


def numbers(text: str, kind: type, option: str) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise PlanError(f"{option} {text!r}: must be numbers separated by commas") from None


def group_choice(text: str) -> GroupSize:
    """What --group-size says. Raises PlanError."""
    if text == AUTO:
        return AUTO
    if not text.isdecimal():
        raise PlanError(f"--group-size {text!r}: must be auto, 32, 64, 128 or 256")
    check_group_size(int(text))
    return int(text)


def destination(positional: Path | None, option: Path | None) -> Path:
    """The folder to write, given once, by either form. Raises OutputError."""
    if (positional is None) == (option is None):
        given = "twice" if option else "nowhere"
        raise OutputError(f"the output is given {given}: name the new folder once, with -o")
    return option or positional  # type: ignore[return-value]


def refuse_unused(given: Mapping[str, object], missing: str) -> None:
    """Raise PlanError for an option that was given, and is of no effect as long as ``missing`` is not.

    Args:
        given: option -> its value; None, False and an empty list where it was not given.
    """
    for name, value in given.items():
        if value is not None and value is not False and value != []:
            shown = "" if value is True else f" {value[0] if isinstance(value, list) else value}"
            raise PlanError(f"{name}{shown}: is of no effect {missing}")


def refuse_stream(source: str, stream: bool) -> None:
    """Raise PlanError for --stream of what lies here as a whole."""
    refuse_unused({"--stream": stream and Path(source).exists()}, f"on {source}, which is no Hub id; leave it out")


def refuse_original(opened: Checkpoint, source: str | None) -> None:
    """Raise PlanError for --source beside a checkpoint that holds its shapes."""
    if not opened.container.needs_conversion:
        refuse_unused({"--source": source}, f"on {opened.path}, which says its shapes itself; leave it out")


def with_policy_options(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose ``policy_options`` become one option for each parameter of a registered policy.

    The command is called with those that were given, as text; ``policy_of`` reads them.
    """
    signature = inspect.signature(command, eval_str=True)
    flags = policy_flags()
    if clash := sorted(flags.keys() & signature.parameters.keys()):
        raise RegistrationError(f"a policy's option {clash[0]!r} is one of the command's own; give it another name")
    added = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[str | None, typer.Option(help=text)],
        )
        for name, text in flags.items()
    ]
    own = [p for p in signature.parameters.values() if p.name != "policy_options"]
    own = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=_named(p.annotation)) for p in own]
    at = next(i for i, p in enumerate(own) if p.name == "policy") + 1

    @wraps(command)
    def run(**arguments: Any) -> None:
        given = {name: text for name in flags if (text := arguments.pop(name)) is not None}
        command(**arguments, policy_options=given)

    run.__signature__ = signature.replace(parameters=[*own[:at], *added, *own[at:]])  # type: ignore[attr-defined]
    return run


def policy_flags() -> dict[str, str]:
    """Parameter -> help, over all registered policies."""
    found: dict[str, list[str]] = {}
    for policy in policies().values():
        for option in fields(policy):  # type: ignore[arg-type]
            found.setdefault(option.name, []).append(
                f"{policy.name.capitalize()} policy: {option.metadata['help']} Default {_text(option.default)}."
            )
    return {name: " ".join(texts) for name, texts in found.items()}


def _named(annotation: Any) -> Any:
    """An option's annotation, with the names of all policies where its help has {policies}."""
    kind, *rest = get_args(annotation)
    if not rest or "{policies}" not in (rest[0].help or ""):
        return annotation
    option = copy(rest[0])
    option.help = option.help.format(policies=", ".join(policies()))
    return Annotated[kind, option]


def implied_policy(given: Mapping[str, str], default: str) -> str:
    """The one policy that has all of these options, such as uniform for bits; ``default`` where they are none, or say nothing.

    Raises:
        PlanError: no policy has all of them.
    """
    options = {name: {option.name for option in fields(policy)} for name, policy in policies().items()}  # type: ignore[arg-type]
    having = [name for name, own in options.items() if given.keys() <= own]
    if not having:
        whose = [f"--{name} of {' or '.join(p for p, own in options.items() if name in own)}" for name in given]
        raise PlanError(f"no policy has all of these options: {', '.join(whose)}; give those of one policy")
    return having[0] if given and len(having) == 1 else default


def policy_of(name: str, given: Mapping[str, str]) -> Policy:
    """The policy of this name with the options that were given as text. Raises PlanError."""
    values: dict[str, Any] = dict(given)
    if name in policies():
        for option in fields(policies()[name]):  # type: ignore[arg-type]
            text = given.get(option.name)
            default = option.default
            if text is None and isinstance(default, tuple):
                text = _text(default)
            if text is not None:
                values[option.name] = _read(option, text)
    return policy_by_name(name, values)


def kurtosis_of(path: Path | None, policy: Policy) -> dict[str, float | None] | None:
    """The κ that a profile's file holds, for a policy that reads it. Raises PlanError."""
    from kappaquant.planning.profile import Profile

    if path is None:
        return None
    if not policy.reads_profile:
        readers = " or ".join(name for name, other in policies().items() if other.reads_profile)
        raise PlanError(
            f"--profile {path}: the {policy.name} policy reads no profile; take --policy {readers}, or leave it out"
        )
    return Profile.load(path).kurtosis()


def _read(option: Field[Any], text: str) -> Any:
    try:
        return option.metadata["read"](text)
    except ValueError:
        flag = "--" + option.name.replace("_", "-")
        raise PlanError(f"{flag} {text!r}: cannot be read; write it like {_text(option.default)}") from None


def _text(value: Any) -> str:
    """A parameter's value as it is written on the command line."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
