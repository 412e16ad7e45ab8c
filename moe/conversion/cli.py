"""moe-convert: a checkpoint from one layout to another, expert by expert, and proof that none was lost on the way.

Exit codes: 0 done; 1 the target does not hold what the source does; 2 what was given cannot be, said in one line.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from moe.conversion.compare import verify
from moe.conversion.convert import convert
from moe.conversion.deepspeed import DeepSpeed
from moe.conversion.detect import HOSTS, detect
from moe.conversion.huggingface import CONFIG, FAMILIES, HuggingFace, family_of
from moe.conversion.layouts import Layout, Ours
from moe.conversion.megatron import Megatron

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
HELP = f"One of {', '.join(HOSTS)}."


@app.command(help=__doc__)
def run(
    source: Annotated[Path, typer.Argument(help="A folder, or a file of safetensors.")],
    target: Annotated[Path, typer.Argument(help="A folder that is not there yet; with --check, one that is.")],
    *,
    source_host: Annotated[str, typer.Option("--from", help=HELP)],
    target_host: Annotated[str, typer.Option("--to", help=HELP)],
    check: Annotated[bool, typer.Option("--check", help="Write nothing: does the target hold the source?")] = False,
    only_layers: Annotated[bool, typer.Option("--only-layers", help="Leave out all that is no MoE layer's.")] = False,
    family: Annotated[str, typer.Option(help=f"Hugging Face, where no config says: {', '.join(FAMILIES)}.")] = "",
    config: Annotated[Path | None, typer.Option(help="To hf: a config.json, or its folder, to go along.")] = None,
    ranks: Annotated[int, typer.Option(help="Expert-parallel ranks, to megatron.")] = 1,
    style: Annotated[str, typer.Option(help="megatron: sequential, te-grouped, grouped; deepspeed: proj, ...")] = "",
    source_style: Annotated[str, typer.Option(help="The same, of the source; found out where not said.")] = "",
    layers: Annotated[str, typer.Option(help="What a layer is called in the target, with {layer} in it.")] = "",
    shard_mb: Annotated[float, typer.Option(help="Most MB of a file of safetensors.")] = 4096.0,
    trust: Annotated[bool, typer.Option("--trust", help="Run what the pickles of the source ask for.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON.")] = False,
) -> None:  # fmt: skip
    facts: dict[str, Any] = {}
    try:
        of = detect(source, source_host, family=family if source_host == "hf" else "", style=source_style, trust=trust)
        if check:
            to = detect(target, target_host, family=family, style=style, trust=trust)
        else:
            to = _wanted(target_host, family, config, ranks, style, layers, round(shard_mb * 2**20))
            facts = asdict(convert(source, target, of=of, to=to, rest=not only_layers))
            to = replace(to, trust=True) if isinstance(to, Megatron | DeepSpeed) else to
        faults = verify(source, target, of=of, to=to, rest=not only_layers)
    except (ValueError, OSError) as error:
        typer.secho(f"moe-convert: {' '.join(str(error).split())}", fg="red", err=True)
        raise typer.Exit(2) from None
    facts = {"from": of.name, "to": to.name, **facts, "faults": list(faults)}
    typer.echo(json.dumps(facts) if as_json else _told(facts))
    raise typer.Exit(1 if faults else 0)


def _wanted(
    host: str, family: str, config: Path | None, ranks: int, style: str, layers: str, shard_bytes: int
) -> Layout:
    """The layout to write in. What it does not listen to is refused."""
    of = {"family": "hf", "config": "hf", "ranks": "megatron", "style": "megatron deepspeed"}
    given = {"family": family, "config": config, "ranks": ranks if ranks != 1 else "", "style": style}
    for option, value in given.items():
        if value and host not in of[option].split() and option != "family":
            raise ValueError(f"--{option} is for {of[option].replace(' ', ' and ')}; got --to {host}")
    named: dict[str, Any] = {"template": layers} if layers else {}
    if style:
        named["style"] = style
    if host == "evenmoe":
        return Ours(**named, shard_bytes=shard_bytes)
    if host == "megatron":
        return Megatron(**named, ranks=ranks)
    if host == "deepspeed":
        return DeepSpeed(**named)
    if host != "hf":
        raise ValueError(f"--to {host!r} is not one of {', '.join(HOSTS)}")
    path = config / CONFIG if config is not None and config.is_dir() else config
    said = family or (family_of(path) if path is not None else None)
    if not said:
        raise ValueError(f"--to hf needs --family, one of {', '.join(FAMILIES)}, or a --config that says one of them")
    return HuggingFace(**named, family=said, config=str(path or ""), shard_bytes=shard_bytes)


def _told(facts: dict[str, Any]) -> str:
    lines = [f"{facts['from']} -> {facts['to']}"]
    if "layers" in facts:
        lines.append(
            f"{facts['layers']} layers, {facts['experts']} experts, {facts['tensors']} tensors, {facts['bytes']} "
            f"bytes; {facts['rest']} tensors are no MoE layer's and keep their names"
        )
        lines += [f"left out: {name}" for name in facts["left_out"]]
    lines += facts["faults"] or ["verified: every expert is where it was, bit for bit"]
    return "\n".join(lines)


def main() -> None:
    app()
