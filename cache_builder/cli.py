"""`build-cache` and `cache-tools`: make teacher caches and look after them.

Imports are inside the commands, so that `--help` needs neither torch nor zarr.
"""

import dataclasses
import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cache_builder.fidelity_tool import fidelity
from cache_builder.tools import diff, gc, repair, verify
from shared.console import (
    AS_JSON,
    DATA,
    DEVICE,
    FILE,
    FOLDER,
    VISION_TOWER,
    Command,
    Group,
    bytes_text,
    configure_logging,
    printable_lines,
)
from shared.progress import IMPORTING, announced

if TYPE_CHECKING:
    from cache_builder.estimate import Estimate
    from cache_builder.skips import SkipLimit
    from cache_builder.summary import Summary
    from shared.spec import CacheSpec


@click.command(cls=Command, name="build-cache")
@click.option(
    "--spec", required=True, metavar="NAME|FILE",
    help="What to store: default, small, align-kd, align-kd-stage1, align-only, or a YAML file of "
    "your own.",
)  # fmt: skip
@click.option("--teacher", required=True, help="MobileVLM V2 folder or Hugging Face hub id.")
@VISION_TOWER
@DATA
@click.option("--out", required=True, type=FOLDER, help="The cache. Run again to continue it.")
@DEVICE
@click.option(
    "--dtype", type=click.Choice(["float32", "bfloat16", "float16"]),
    help="The teacher's number format; part of the cache's identity.  "
    "[default: bfloat16 on CUDA, float32 on CPU]",
)  # fmt: skip
@click.option(
    "--batch-size", type=click.IntRange(min=1),
    help="Samples, and images, per forward pass; changes speed and memory, not content.  "
    "[default: 16 on CUDA, 4 on CPU]",
)  # fmt: skip
@click.option(
    "--max-skipped", default="1%", show_default=True, metavar="SHARE|COUNT",
    help="Stop when more samples than this cannot be used: a share of all samples in --data, "
    "rounded up, or a count.",
)  # fmt: skip
@click.option(
    "--dry-run", is_flag=True,
    help="Estimate the bytes, before compression, of the shards that --out still lacks, from some "
    "2,000 samples, but says nothing about time. Nothing is written, no weights are read.",
)  # fmt: skip
@AS_JSON
@click.option("-v", "--verbose", is_flag=True, help="Log a line per shard to stderr.")
def build_cache(
    spec: str, teacher: str, vision_tower: str | None, data: tuple[str, ...], out: Path,
    device: str | None, dtype: str | None, batch_size: int | None, max_skipped: str, dry_run: bool,
    as_json: bool, verbose: bool,
) -> None:  # fmt: skip
    """Run a teacher once over tars and store what Align-KD needs of it.

    One shard per tar, committed as a whole: kill it at any moment and run the same command again to
    continue. SIGTERM stops it cleanly, with exit code 0. Several runs may build into one folder.
    """
    configure_logging(verbose)
    from cache_builder.skips import SkipLimit
    from shared.spec import CacheSpec
    from shared.stopping import AGAIN, Stopped, stop_on_sigterm
    from shared.tar_names import expand_tars

    loaded_spec, tars, limit = CacheSpec.load(spec), expand_tars(data), SkipLimit.parse(max_skipped)
    if dry_run:
        _dry_run(loaded_spec, teacher, vision_tower, tars, out, dtype, limit, as_json)
        return
    try:
        with stop_on_sigterm() as stop:
            with announced(IMPORTING):
                from cache_builder import build
                from cache_builder.setup import load_builder
            builder = load_builder(
                loaded_spec, teacher, vision_tower=vision_tower, device=device, dtype=dtype,
                batch_size=batch_size,
            )  # fmt: skip
            report = build.build_cache(builder, tars, out, max_skipped=limit, stop=stop)
    except Stopped:
        if as_json:
            click.echo(json.dumps({"stopped": True, "built": 0}))
        else:
            click.echo(f"{out}: stopped by SIGTERM before a shard was built; {AGAIN}")
        return
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(report)))
        return
    click.echo(
        f"{out}: {report.built} shards built, {report.present} were there; "
        f"{report.samples} samples stored, {report.skipped} skipped "
        f"(see cache-tools info {out}){report.stopped}"
    )


@click.group(cls=Group, name="cache-tools")
def cache_tools() -> None:
    """Pack data sets into tars, and look into and after caches."""


for command in (verify, repair, gc, diff, fidelity):
    cache_tools.add_command(command)


@cache_tools.command(cls=Command)
@click.option("--annotations", required=True, type=FILE, help="LLaVA-format JSON.")
@click.option("--images", type=FOLDER, help="Folder of its images; needed if it names one.")
@click.option("--out", required=True, type=FOLDER, help="Folder for the tars.")
@click.option(
    "--samples-per-tar", default=500, show_default=True, type=click.IntRange(min=1),
    help="Samples per tar, and so per shard: the unit of resuming. Conversations about one image "
    "stay together, so a tar may hold a few more.",
)  # fmt: skip
@click.option("--prefix", default="shard", show_default=True, help="Tars are <prefix>-000000.tar.")
def pack(
    annotations: Path, images: Path | None, out: Path, samples_per_tar: int, prefix: str
) -> None:
    """Pack LLaVA-format JSON and its images into WebDataset tars.

    The same input gives the same bytes. Ids become keys of samples, / and . in them _; a key that
    stands again is numbered: k, k-1, k-2.
    """
    from cache_builder.pack import pack as pack_tars

    report = pack_tars(annotations, images, out, samples_per_tar=samples_per_tar, prefix=prefix)
    renamed = f"; {report.renamed} ids stood before and are numbered" if report.renamed else ""
    click.echo(
        f"{out}: {report.tars} tars, {report.samples} samples, {report.images} images{renamed}"
    )


@cache_tools.command(cls=Command)
@click.argument("cache", type=FOLDER)
@AS_JSON
def info(cache: Path, as_json: bool) -> None:
    """Say what CACHE is, how far its build is, what it weighs and what was skipped.

    Reads records and plans only.
    """
    from cache_builder.summary import summarise

    summary = summarise(cache)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(summary), indent=1))
    else:
        click.echo(printable_lines(_summary_lines(cache, summary)))


def _dry_run(
    spec: "CacheSpec", teacher: str, vision_tower: str | None, tars: list[Path], out: Path,
    dtype: str | None, limit: "SkipLimit", as_json: bool,
) -> None:  # fmt: skip
    with announced(IMPORTING):
        import msgspec

        from cache_builder.estimate import estimate

    found = estimate(spec, teacher, vision_tower, tars, out, dtype)
    if as_json:
        click.echo(json.dumps({**msgspec.to_builtins(found), "size": found.size}, indent=1))
    else:
        there = len(tars) - found.tars
        lines = [f"{there} of {len(tars)} tars have their shard in {out} already"] if there else []
        click.echo("\n".join([*lines, *_estimate_lines(found), *_over_limit(found, limit)]))


def _over_limit(found: "Estimate", limit: "SkipLimit") -> list[str]:
    allowed = limit.allowed(found.all_samples)
    if found.all_skipped <= allowed:
        return []
    return [
        f"A build would stop: some {found.all_skipped} of {found.all_samples} samples cannot be "
        f"used, --max-skipped {limit.text} allows {allowed}"
    ]


def _estimate_lines(found: "Estimate") -> list[str]:
    lines = [
        f"dry run: {found.samples} samples in {found.tars} tars, {found.examined} of them examined"
        f"; {len(found.skipped)} of those would be skipped",
        f"{'signal':<18} {'per':<18} {'each':>10} {'number':>12} {'total':>10}",
    ]
    lines += [
        f"{s.signal:<18} {s.unit:<18} {bytes_text(s.unit_bytes):>10} {s.units:>12.0f} "
        f"{bytes_text(s.size):>10}"
        for s in found.signals
    ]
    each = found.size / max(1, found.samples)
    lines.append(
        f"{'all':<18} {'sample':<18} {bytes_text(each):>10} {found.samples:>12} "
        f"{bytes_text(found.size):>10}   before compression"
    )
    lines += [f"would skip {s.key}: {s.reason}" for s in found.skipped[:10]]
    return lines


def _summary_lines(cache: Path, summary: "Summary") -> list[str]:
    each = summary.size / max(1, summary.samples)
    state = "complete" if not summary.pending else f"{len(summary.pending)} to build"
    lines = [
        f"{cache}",
        f"shards    {summary.shards} of {summary.planned} planned ({state})",
        f"samples   {summary.samples}, {summary.skipped} skipped, {summary.images} images",
        f"size      {bytes_text(summary.size)}, {bytes_text(each)} a sample",
    ]
    lines += [f"  {name:<18} {bytes_text(size):>10}" for name, size in summary.sizes.items()]
    if summary.identity:
        lines += _identity_lines(summary.identity)
    if summary.misfits:
        lines.append(
            f"of another build {len(summary.misfits)} shards: cache-tools verify {cache} says how"
        )
    lines += _skip_lines(summary)
    lines += [f"pending   {name}" for name in summary.pending[:10]]
    if len(summary.pending) > 10:
        lines.append(f"pending   and {len(summary.pending) - 10} more")
    return lines


def _skip_lines(summary: "Summary") -> Iterator[str]:
    samples: defaultdict[str, list[str]] = defaultdict(list)
    for sample in summary.skipped_samples:
        samples[sample.reason].append(f"{sample.key} in {sample.shard}")
    for reason, number in summary.skip_reasons.items():
        more = ", ... (--json: all)" if number > 3 else ""
        yield f"skipped   {number} x {reason}"
        yield f"          {', '.join(samples[reason][:3])}{more}"


def _identity_lines(identity: "dict[str, dict[str, object]]") -> list[str]:
    spec, teacher = identity["spec"], identity["teacher"]
    stored = [name for name in ("attention", "vision_tokens", "logprobs") if spec.get(name)]
    return [
        f"template  {spec['template']}, image {spec['image_aspect']}, "
        f"at most {spec['max_tokens']} tokens",
        *(f"stored    {name}: {json.dumps(spec[name])}" for name in stored),
        f"teacher   width {teacher['hidden_size']}, {teacher['attention_heads']} heads, weights "
        f"{str(teacher['weights_sha256'])[:12]}, {identity['numerics']['dtype']}",
        f"tokenizer {identity['tokenizer']['vocab_size']} tokens, vocabulary "
        f"{str(identity['tokenizer']['vocab_sha256'])[:12]}",
    ]
