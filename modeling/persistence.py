"""Loading and saving that never leave half a model: not in memory, not in a folder.

transformers fills weights that a checkpoint lacks with random numbers and a warning, reads pickles where it finds no
safetensors, and overwrites a folder file by file. Here the first two are refused, and a folder changes only once all
of the new files are written.
"""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar, Self

from transformers.modeling_utils import PreTrainedModel

TRUNK_CLASS = "trunk.DuetMoeModel"  # where a saved checkpoint keeps what `AutoModel` loads without this package
SAFETENSORS_HEADER_LIMIT = 100_000_000  # bytes; the format's own
PUSH = (
    "push_to_hub", "repo_id", "commit_message", "commit_description", "private", "token", "revision", "create_pr",
    "tags",
)  # fmt: skip


class CheckedPreTrainedModel(PreTrainedModel):
    """A `PreTrainedModel` with guards round `from_pretrained`, `save_pretrained` and `push_to_hub`."""

    # The installed package writes the card of a repository that has none; on other machines transformers' own stays.
    fill_card: ClassVar[Callable | None] = None

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *args: object,
        use_safetensors: bool | None = None,
        output_loading_info: bool = False,
        **kwargs: object,
    ) -> Self:
        """Load as in transformers, but whole or not at all, and from safetensors only.

        Weights that a checkpoint lacks are random, as in transformers, only where you take that into your own hands:
        with `output_loading_info=True`, `ignore_mismatched_sizes=True`, or a `state_dict` instead of a checkpoint.

        Raises:
            OSError: if there is no such model or revision, or a weight file is missing, cut off or no safetensors.
            ValueError: if the checkpoint lacks weights of this model, is of another family or of a newer version.
        """
        if use_safetensors is False:
            raise ValueError(
                "use_safetensors=False is not possible: weights are read from safetensors, never unpickled."
            )
        try:
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, *args, use_safetensors=True, output_loading_info=True, **kwargs
            )
        except OSError as error:
            if "no file named model.safetensors" in str(error) or "cannot be loaded with `safetensors`" in str(error):
                raise OSError(
                    f"{str(pretrained_model_name_or_path)!r} has no weights in safetensors. A pickle, such as "
                    "pytorch_model.bin, is never read, because reading it can run foreign code: ask for safetensors."
                ) from error
            raise
        if output_loading_info:
            return model, info  # type: ignore[return-value]
        asked_for = kwargs.get("ignore_mismatched_sizes") or pretrained_model_name_or_path is None
        missing = info["missing_keys"] | model.__dict__.pop("_missing_base_weights", set())
        if missing and not asked_for:
            raise ValueError(_gaps(str(pretrained_model_name_or_path), cls.__name__, sorted(missing)))
        return model

    @classmethod
    def _load_pretrained_model(cls, *args: object, **kwargs: object) -> tuple:
        files = kwargs["checkpoint_files"] if "checkpoint_files" in kwargs else args[2]
        for file in files or ():  # type: ignore[attr-defined]
            check_safetensors(file)
        return super()._load_pretrained_model(*args, **kwargs)

    @classmethod
    def _finalize_model_loading(cls, model: PreTrainedModel, *args: object, **kwargs: object) -> object:
        info = super()._finalize_model_loading(model, *args, **kwargs)
        model._missing_base_weights = set(info.missing_keys)  # with an adapter, the caller hears of its keys alone
        return info

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        variant: str | None = None,
        **kwargs: object,
    ) -> None:
        """Save as in transformers, without ever leaving half a checkpoint.

        The files are written to a hidden folder inside `save_directory` and moved into place when all of them are
        there, so an error, such as a full disk, leaves what was there before as it was. For that time the disk holds
        both. If the machine stops during the moves, the folder holds a whole checkpoint or, in shards, one that
        loading refuses: weights that loading starts from are the first to go and the last to come. Weights of an
        earlier save that the new ones replace are removed. Ranks of a `distributed_checkpoint` write straight to the
        folder.

        Raises:
            OSError: if the files cannot be written.
        """
        if os.path.isfile(save_directory):
            raise NotADirectoryError(f"{os.fspath(save_directory)!r} is a file: save to a folder.")
        self.config.auto_map = {"AutoModel": TRUNK_CLASS} | (getattr(self.config, "auto_map", None) or {})
        if kwargs.get("distributed_checkpoint") or not self.should_save_on_this_rank(is_main_process):
            super().save_pretrained(save_directory, is_main_process, variant=variant, **kwargs)
            return
        push = {name: kwargs.pop(name) for name in PUSH if name in kwargs}
        with written_whole(Path(save_directory), variant) as folder:
            super().save_pretrained(folder, is_main_process, variant=variant, **kwargs)
        if push.pop("push_to_hub", False):
            shards = {name: kwargs[name] for name in ("max_shard_size",) if name in kwargs}
            self.push_to_hub(push.pop("repo_id", Path(save_directory).name), **shards, **push)

    def _upload_modified_files(self, working_dir: str, repo_id: str, *args: object, **kwargs: object) -> object:
        if self.fill_card is not None:
            self.fill_card(working_dir, repo_id)
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)


def check_safetensors(file: str | os.PathLike) -> None:
    """Check that a safetensors file is as long as its header says; nothing else of it is read.

    Raises:
        OSError: if it is missing, cut off, or in another format.
    """
    name = os.fspath(file)
    if not os.path.isfile(file):
        raise FileNotFoundError(f"{name} is missing, and the checkpoint needs it: fetch or copy it again.")
    size = os.path.getsize(file)
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = stream.read(length) if length < SAFETENSORS_HEADER_LIMIT else b""
    try:
        tensors = {key: value for key, value in json.loads(header).items() if key != "__metadata__"}
        expected = 8 + length + max((tensor["data_offsets"][1] for tensor in tensors.values()), default=0)
    except (ValueError, AttributeError, KeyError, TypeError):
        if 8 <= size < 8 + length < SAFETENSORS_HEADER_LIMIT:
            raise OSError(f"{name} is cut off inside its header: fetch or copy it again.") from None
        raise OSError(f"{name} is not a safetensors file; other formats, pickles above all, are never read.") from None
    if size != expected:
        raise OSError(f"{name} has {size:,} bytes and should have {expected:,}: fetch or copy it again.")


@contextmanager
def written_whole(folder: Path, variant: str | None = None) -> Iterator[Path]:
    """Give a hidden folder inside `folder` to write to; move its files up if all went well, else remove them.

    Raises:
        OSError: if writing failed; `folder` is as it was.
    """
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=folder))
    try:
        try:
            yield unfinished
        except Exception as error:
            # safetensors, which writes the weights, has an error of its own that is no OSError.
            if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
                raise OSError(f"Nothing was saved to {str(folder)!r}, which is as it was: {error}") from error
            raise
        _move_up(unfinished, folder, variant)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        if made and not any(folder.iterdir()):
            folder.rmdir()


def _move_up(unfinished: Path, folder: Path, variant: str | None) -> None:
    dot = f".{variant}" if variant else ""
    single, index = f"model{dot}.safetensors", f"model.safetensors.index{dot}.json"
    new = sorted((path.name for path in unfinished.iterdir()), key=lambda name: name in (single, index))
    if index in new:
        for name in (single, index):
            (folder / name).unlink(missing_ok=True)
    for name in new:
        os.replace(unfinished / name, folder / name)
    weights = re.compile(rf"{re.escape(single)}|{re.escape(index)}|model{re.escape(dot)}-\d+-of-\d+\.safetensors")
    if single in new or index in new:
        for path in folder.iterdir():
            if weights.fullmatch(path.name) and path.name not in new:
                path.unlink()


def _gaps(source: str, model: str, missing: list[str]) -> str:
    shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
    return (
        f"{source!r} lacks weights that {model} needs: {shown}. With random numbers there it would write nonsense: "
        "use a whole checkpoint and the config it was saved with, or pass ignore_mismatched_sizes=True to train them."
    )
