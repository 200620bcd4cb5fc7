"""bitmill compare."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from bitmill.cli.options import AsJson, Device, HeadBits, TrustRemoteCode
from bitmill.cli.output import working
from bitmill.errors import BitmillError, UsageError

if TYPE_CHECKING:
    from bitmill.report.results import Results


def compare(
    model: Annotated[
        str, typer.Argument(help="Demo model, Hugging Face folder or hub id, or .gguf file.", show_default=False)
    ],
    out: Annotated[
        Path,
        typer.Option("-o", "--out", help="Folder of the comparison; continued if it exists.", show_default=False),
    ],
    methods: Annotated[str, typer.Option(metavar="A,B", help="Named methods, or all.", show_default=False)] = "",
    bits: Annotated[
        str, typer.Option(metavar="B,C", help="Bits for each of the methods.", show_default=False)
    ] = "",
    recipes: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE",
            help="Recipe .yaml or one of your own, one variant each; repeatable.",
            show_default=False,
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="METHOD.KEY=VALUE", help="Option of one method; repeatable.", show_default=False
        ),
    ] = None,
    calib: Annotated[
        str, typer.Option(metavar="SOURCE", help="Text: its first four fifths calibrate, the rest measures.")
    ] = "pydoc",
    samples: Annotated[int, typer.Option(metavar="N", help="Calibration windows.")] = 128,
    seqlen: Annotated[int, typer.Option(metavar="L", help="Tokens in a window.")] = 512,
    seed: Annotated[int, typer.Option(metavar="S", help="Which calibration windows are drawn.")] = 0,
    windows: Annotated[int, typer.Option(metavar="W", help="Held-out windows to measure on.")] = 40,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Prompts to answer, one a line; three of our own otherwise.", show_default=False
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(metavar="N", help="Most tokens of an answer.")] = 48,
    propagate: Annotated[
        Literal["quantized", "float"],
        typer.Option(
            help="Whose outputs later blocks are calibrated on; with float all share one pass's statistics."
        ),
    ] = "quantized",
    head_bits: HeadBits = None,
    device: Device = "cpu",
    keep_models: Annotated[bool, typer.Option("--keep-models", help="Keep the quantized folders.")] = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Quantize a model in several ways, measure each on the same terms, and write a page about it."""
    with working(as_json, "interrupted; the same command continues") as output:
        output.progress.start("starting", 0)
        from bitmill.data.windows import Calibration
        from bitmill.recipes.method import METHODS
        from bitmill.report.comparison import results_table
        from bitmill.workflows.comparison.cells import PROMPTS
        from bitmill.workflows.comparison.compare import compare

        named = METHODS.names() if methods.strip() == "all" else words(methods)
        results = compare(
            model,
            named,
            [_whole(word) for word in words(bits)],
            out=out,
            recipes=[path for given in recipes or [] for path in words(given)],
            options=per_method(settings or []),
            calibration=Calibration(calib, samples, seqlen, seed),
            windows=windows,
            prompts=PROMPTS if prompts is None else read_prompts(prompts),
            max_new_tokens=max_new_tokens,
            propagate=propagate,
            head_bits=head_bits,
            device=device,
            trust_remote_code=trust_remote_code,
            keep_models=keep_models,
            progress=output.progress,
        )
        data = {"out": str(out), **results.model_dump(exclude={"variants": {"__all__": {"layers"}}})}
        output.result(data, lambda: [results_table(results), *_remarks(results, out)])
    failed = [variant for variant in results.variants if variant.status == "failed"]
    if failed:
        raise BitmillError(
            f"{len(failed)} of {len(results.variants)} variants failed, the first one {failed[0].name!r}; "
            "the same command tries them again."
        )


def words(text: str) -> list[str]:
    """The words of a list with commas."""
    return [word.strip() for word in text.split(",") if word.strip()]


def per_method(settings: list[str]) -> dict[str, dict[str, Any]]:
    """Options by method from METHOD.KEY=VALUE. Raises UsageError."""
    options: dict[str, dict[str, Any]] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        method, dot, key = name.strip().rpartition(".")
        key = key.replace("-", "_")
        if not (equals and dot and method and key.isidentifier()):
            raise UsageError(
                f"--set wants METHOD.KEY=VALUE here, not {setting!r}; for example --set gptq.damp=0.05."
            )
        of_method = options.setdefault(method, {})
        if key in of_method:
            raise UsageError(f"--set gives {key!r} of {method!r} twice; give it once.")
        of_method[key] = value.strip()
    return options


def read_prompts(path: Path) -> list[str]:
    """Prompts from a text file, one a line; empty lines do not count. Raises UsageError."""
    try:
        prompts = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"The prompts in {path} cannot be read: {error}.") from None
    if not prompts:
        raise UsageError(f"{path} holds no prompts; write one a line.")
    return prompts


def _whole(word: str) -> int:
    if not word.isdigit():
        raise UsageError(f"--bits holds {word!r}; give whole numbers such as 2,3,4.")
    return int(word)


def _remarks(results: Results, out: Path) -> list[str]:
    from rich.markup import escape

    lines = [
        f"{escape(variant.name)}: {variant.status.replace('_', ' ')}: {escape(variant.reason or '')}"
        for variant in results.variants
        if variant.reason
    ]
    return [*lines, f"page  {escape(str(out / 'report.html'))}", f"data  {escape(str(out / 'results.json'))}"]
