"""A Hugging Face folder (config.json and safetensors) as a source of weights."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bitmill.config.documents import read_json_object
from bitmill.errors import OutputError, SourceError, one_line
from bitmill.sources.base import StoredType, config_bytes, hash_file
from bitmill.sources.config_bounds import read_config
from bitmill.sources.hub import HubOrigin
from bitmill.sources.pooling import read_pooling, sentence_modules
from bitmill.sources.safetensors_header import TensorEntry, read_header
from bitmill.sources.side_files import ADAPTER, side_files

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
MAX_JSON_BYTES = 100_000_000


class HfSource:
    """One folder, whose tensors are read one at a time.

    Args:
        folder: the folder.
        name: name for messages; that of the folder without it.
        hub: the folder is a snapshot in the cache of the Hub, whose files are links into the blob store of the
            cache; any other folder may not link out of itself.
        origin: where on the Hub the folder comes from.
        trust_remote_code: allow Python code in the folder.

    Raises:
        SourceError: The folder holds no float model, or is damaged.
    """

    as_saved = True
    states_dtype = True

    def __init__(
        self,
        folder: str | Path,
        *,
        name: str | None = None,
        hub: bool = False,
        origin: HubOrigin | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        self.folder = Path(folder)
        self.name = name or self.folder.resolve().name
        self.origin = origin
        self.trust_remote_code = trust_remote_code
        # snapshots/<commit>/file -> ../../blobs/<hash>, inside models--org--name
        self._root = self.folder.resolve().parents[1] if hub else self.folder.resolve()
        self.config = self._read_config()
        self._shards = self._find_shards()
        self._entries: dict[str, tuple[Path, str, TensorEntry]] = {}
        for shard in self._shards:
            for stored, entry in read_header(shard).items():
                if stored in self._entries:
                    raise SourceError(
                        f"{self.folder} stores the tensor {stored!r} twice, "
                        f"in {self._entries[stored][0].name} and {shard.name}; remove one."
                    )
                self._entries[stored] = (shard, stored, entry)
        self._check_index()
        self._fingerprint: str | None = None

    def names(self) -> list[str]:
        """Return the names of the stored tensors, shard by shard."""
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of one tensor, from the header."""
        return self._lookup(name)[2].shape

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of one tensor, from the header."""
        return self._lookup(name)[2].dtype

    def tensor(self, name: str) -> torch.Tensor:
        """Read one tensor into memory of its own.

        Memory maps are avoided, because mapped pages count as resident in addition to the copy made from them.
        """
        shard, stored, entry = self._lookup(name)
        tensor = torch.empty(entry.shape, dtype=entry.dtype)
        raw = tensor.reshape(-1).view(torch.uint8).numpy()
        try:
            with shard.open("rb") as file:
                file.seek(8 + int.from_bytes(file.read(8), "little") + entry.begin)
                count = file.readinto(raw.data)
        except OSError as error:
            raise SourceError(f"{shard} cannot be read at {stored!r} ({one_line(error)}).") from error
        if count != raw.nbytes:
            raise SourceError(f"{shard} ended inside {stored!r} while it was read; fetch it again.")
        return tensor

    def stored_types(self) -> list[StoredType]:
        """Return []: all weights are floats."""
        return []

    def fingerprint(self) -> str:
        """Return the sha256 (hex) over the config and the bytes of every shard."""
        if self._fingerprint is None:
            digest = hashlib.sha256(config_bytes(self.config))
            for shard in self._shards:
                hash_file(digest, shard)
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def write_auxiliary_files(self, folder: Path) -> None:
        """Copy the files besides weights and config.json, those of subfolders too, see `side_files`.

        Links that lead out of the folder are not copied.
        """
        modules = {str(module["path"]) for module in sentence_modules(self.folder)} - {""}
        for name in side_files(self.folder, modules):
            if not self._inside(self.folder / name):
                continue
            target = folder / name
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(self.folder / name, target)
            except OSError as error:
                raise OutputError(
                    f"{name} cannot be copied to {target} ({error.strerror}); "
                    "free some space, or choose another folder."
                ) from error

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the tokenizer of the folder. Raises SourceError."""
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(
                str(self.folder), trust_remote_code=self.trust_remote_code, local_files_only=True
            )
        except Exception as error:  # every tokenizer class fails in its own way
            raise SourceError(
                f"{self.folder} holds no tokenizer that can be loaded "
                f"({one_line(error)}); copy the tokenizer files of the original model into it."
            ) from error

    def processor(self, class_name: str) -> Any:
        """Return the processor of pictures or sound of the folder, see `Source.processor`."""
        import transformers

        try:
            return getattr(transformers, class_name).from_pretrained(
                str(self.folder), trust_remote_code=self.trust_remote_code, local_files_only=True
            )
        except Exception as error:  # as those of tokenizers
            raise SourceError(
                f"{self.folder} holds no {class_name.removeprefix('Auto')} that can be loaded "
                f"({one_line(error)}); copy preprocessor_config.json and the tokenizer of the original "
                "model into it, and install bitmill[vision] for pictures."
            ) from error

    def pooling(self) -> str:
        """Return the pooling of the folder's 1_Pooling/config.json."""
        return read_pooling(self.folder)

    def _lookup(self, name: str) -> tuple[Path, str, TensorEntry]:
        """Return shard, stored name and entry of a tensor. Raises SourceError for an unknown name."""
        try:
            return self._entries[name]
        except KeyError:
            raise SourceError(f"The model {self.name!r} has no tensor {name!r}.") from None

    def _inside(self, path: Path) -> bool:
        """Return True if a path, with links followed, is inside the folder."""
        return Path(os.path.realpath(path)).is_relative_to(self._root)

    def _read_config(self) -> PretrainedConfig:
        """Return the config. Raises SourceError where it is absent or that of a quantized model."""
        path = self.folder / "config.json"
        if not path.is_file():
            raise SourceError(f"{self.folder} has no config.json; give the folder of a Hugging Face model.")
        if (self.folder / ADAPTER).exists():
            raise SourceError(
                f"{self.folder} holds an adapter that is not merged ({ADAPTER}); merge it into the weights first "
                "(merge_and_unload of peft), or remove its files to quantize the model without it."
            )
        plain = self._read_json(path)
        self._explicit = plain.get("transformers_weights")  # the name of the file that transformers then reads
        for part in (plain, *(value for value in plain.values() if isinstance(value, dict))):
            for key in ("quantization_config", "compression_config"):
                if quantized := part.get(key):
                    self._meet_quantized(quantized)
        return load_config(self.folder, self.trust_remote_code, "auto_map" in plain)

    def _meet_quantized(self, described: Any) -> None:
        """Raise SourceError: the model is quantized already, as a config describes it."""
        method = described.get("quant_method") if isinstance(described, dict) else None
        raise SourceError(
            f"{self.folder} is already quantized by {method or 'another tool'}; give the float model, or bring "
            "its codes into a folder with bitmill import."
        )

    def _read_json(self, path: Path) -> dict[str, Any]:
        """Return a JSON object from a file of the folder. Raises SourceError."""
        if not self._inside(path):
            raise SourceError(f"{path} is a link out of its folder, which is not followed; copy the file there.")
        return read_json_object(path, SourceError, MAX_JSON_BYTES, "fetch it again")

    def _find_shards(self) -> list[Path]:
        """Return the files of weights that transformers reads, and keep their index. Raises SourceError."""
        self._index: dict[str, Any] | None = None
        if (chosen := self._weights_file()) is not None:
            if not chosen.endswith(".index.json"):
                return [self._shard(chosen)]
            index = self.folder / chosen
            self._index = self._read_json(index).get("weight_map")
            if not isinstance(self._index, dict) or not self._index:
                raise SourceError(f"{index} has no weight_map; fetch it again.")
            return [self._shard(name) for name in sorted({str(shard) for shard in self._index.values()})]
        files = sorted(path.name for path in self.folder.glob("*.safetensors"))
        read = next((name for name in PICKLES if (self.folder / name).exists()), None)
        if files and read:
            raise SourceError(
                f"{self.folder} holds {files[0]} and {read}, of which transformers reads {read}; rename "
                f"{files[0]} to {SINGLE} if it is the model."
            )
        if len(files) == 1:
            return [self._shard(files[0])]
        if files:
            raise SourceError(f"{self.folder} has {len(files)} safetensors files and no {INDEX}; fetch the index.")
        pickles = [p.name for p in self.folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt")]
        if pickles:
            raise SourceError(
                f"{self.folder} holds only {min(pickles)}, and bitmill never unpickles; convert it to safetensors."
            )
        raise SourceError(f"{self.folder} holds no weights; {SINGLE} or {INDEX} is needed.")

    def _weights_file(self) -> str | None:
        """Return the file or the index that transformers reads: one file comes before an index."""
        if self._explicit is not None:
            name = str(self._explicit)
            if not name.endswith((".safetensors", ".safetensors.index.json")) or Path(name).name != name:
                raise SourceError(
                    f"The config of {self.folder} names its weights {name!r}; name a safetensors file inside it."
                )
            return name
        return next((name for name in (SINGLE, INDEX) if (self.folder / name).is_file()), None)

    def _shard(self, name: str) -> Path:
        """Return the path of a shard. Raises SourceError where it is absent or outside the folder."""
        path = self.folder / name
        if Path(name).name != name or not self._inside(path):
            raise SourceError(
                f"The shard {name!r} of {self.folder} is outside that folder, so it is not read; if it is a link, "
                "copy the folder with its links followed (cp -rL)."
            )
        if not path.is_file():
            raise SourceError(f"{self.folder} lacks the shard {name!r} that its index names; fetch it again.")
        return path

    def _check_index(self) -> None:
        """Raise SourceError for a tensor that is not in the shard that the index names."""
        for name, shard in (self._index or {}).items():
            if name not in self._entries or self._entries[name][0].name != shard:
                raise SourceError(
                    f"{self.folder} lacks the tensor {name!r}, which its index expects in {shard!r}."
                )


def load_config(folder: Path, trust_remote_code: bool, has_code: bool = False) -> PretrainedConfig:
    """Return the transformers config of a folder.

    Args:
        folder: folder with a config.json.
        trust_remote_code: allow Python code in the folder.
        has_code: the config names such code, which an error should mention.

    Raises:
        SourceError: transformers cannot read the config.
    """
    from transformers import AutoConfig

    read_config(folder / "config.json")
    try:
        return AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # the config classes validate, each in its own way
        hint = "; if you trust the code in this folder, allow remote code" if has_code else ""
        raise SourceError(
            f"{folder / 'config.json'} describes no model that transformers supports ({one_line(error)}){hint}."
        ) from error
