"""The card of a voice: who made it, when, for which base, from how much text, and how well it does.

`voice.json` is the card; `README.md` shows the same to people and to the Hub. Neither holds any text of the corpus.
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from duet_moe.modeling.checkpoints import HUB_ID, bundled
from duet_moe.modeling.voice_files import check_name

FORMAT_VERSION = 1
FILE = "voice.json"
LARGEST = 1 << 20  # bytes of a card; one of ours has a few thousand
_DIGEST = re.compile(r"[0-9a-f]{64}")
_BASE_NAME = re.compile(r"[\w.-]+")
_TEMPLATE = Path(__file__).parent / "voice_card.md"


@dataclass(frozen=True)
class VoiceCard:
    """What is known of a voice.

    Args:
        created (`str`): ISO 8601 time in UTC.
        base (`dict`): `{"name": bundled name, folder name or Hub id, "hashes": {"shared": sha256, "trunk": sha256 or
            None}}`.
        corpus (`dict`): statistics of the corpus, none of its text.
        figures (`dict`): what was measured, with the commands.
        adapter_sha256 (`str`): digest of `adapter_model.safetensors`.

    Raises:
        ValueError: on a value that a card cannot hold; the message names the field.
    """

    name: str
    created: str
    author: str
    licence: str
    base: dict[str, Any]
    adapter_sha256: str
    corpus: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        if self.format_version != FORMAT_VERSION:
            raise ValueError(
                f"The voice has format_version {self.format_version!r} and this version of duet-moe reads "
                f"{FORMAT_VERSION}: upgrade it with `pip install -U duet-moe`."
            )
        for name in ("name", "created", "author", "licence", "adapter_sha256"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value.isprintable() or len(value) > 1000:
                raise ValueError(f"{name} is {value!r:.80}; give up to 1,000 characters in one line.")
        check_name(self.name)
        if _utc_offset(self.created) != timedelta(0):
            raise ValueError(f"created is {self.created!r}; give an ISO time in UTC, as 2026-01-31T12:00:00+00:00.")
        if not _DIGEST.fullmatch(self.adapter_sha256):
            raise ValueError(f"adapter_sha256 is {self.adapter_sha256!r}; give 64 hexadecimal digits.")
        for name in ("base", "corpus", "recipe", "figures", "environment"):
            if not isinstance(getattr(self, name), dict):
                raise ValueError(f"{name} is {getattr(self, name)!r:.80}; give a mapping.")
        _check_base(self.base)
        self.to_json()

    def to_json(self) -> str:
        """Return the text of `voice.json`.

        Raises:
            ValueError: if a field holds what JSON cannot (NaN, objects).
        """
        try:
            return json.dumps(asdict(self), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"The card of voice {self.name!r} is not plain data: {error}") from error

    def save(self, folder: str | Path) -> None:
        """Write `voice.json` and `README.md` to `folder`, each whole or not at all."""
        for name, text in (("README.md", self.page()), (FILE, self.to_json())):
            unfinished = Path(folder, f".{name}.unfinished")
            try:
                unfinished.write_text(text, encoding="utf-8")
                os.replace(unfinished, Path(folder, name))
            finally:
                unfinished.unlink(missing_ok=True)

    @classmethod
    def load(cls, folder: str | Path) -> "VoiceCard":
        """Read the card of the voice in `folder`.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if it is damaged, of a newer version, or lacks a field.
        """
        path = Path(folder, FILE)
        if path.is_symlink() or not path.is_file():
            raise FileNotFoundError(f"{path} is missing: {str(folder)!r} is not a whole voice.")
        if path.stat().st_size > LARGEST:
            raise ValueError(f"{path} has {path.stat().st_size:,} bytes; a card has at most {LARGEST:,}.")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is damaged ({error}): train or import the voice again.") from error
        if not isinstance(content, dict):
            raise ValueError(f"{path} is damaged: it holds {type(content).__name__}, not a card.")
        if content.get("format_version") == FORMAT_VERSION:  # another version's fields are another's
            known = {part.name for part in fields(cls)}
            if wrong := sorted(content.keys() ^ known):
                raise ValueError(f"{path} lacks or does not know these fields: {wrong}; a card has {sorted(known)}.")
            return cls(**content)
        raise ValueError(
            f"{path} has format_version {content.get('format_version')!r} and this version of duet-moe reads "
            f"{FORMAT_VERSION}: upgrade it with `pip install -U duet-moe`."
        )

    def page(self) -> str:
        """Return the model card as Markdown with the metadata that the Hub reads."""
        base = self.base["name"]
        data = ModelCardData(
            base_model=base,
            library_name="peft",
            pipeline_tag="text-generation",
            license=self.licence,
            tags=["duet_moe", "lora", "voice", f"base_model:adapter:{base}"],
        )
        shown = {
            "name": self.name,
            "base": base,
            "source": _source(base),
            "shared": self.base["hashes"]["shared"],
            "trunk": self.base["hashes"]["trunk"] or "not recorded (the trunk was quantised)",
            "author": self.author,
            "created": self.created,
            "licence": self.licence,
            "sha256": self.adapter_sha256,
            **{part: _table(getattr(self, part)) for part in ("corpus", "recipe", "figures", "environment")},
        }
        page = re.sub(r"\{(\w+)\}", lambda gap: shown[gap[1]], _TEMPLATE.read_text(encoding="utf-8"))
        return f"---\n{data.to_yaml()}\n---\n\n{page}"


def flat_rows(values: Mapping[str, object], before: str = "") -> list[tuple[str, str]]:
    """Return (name, value) of all that a mapping holds, nested names joined by a colon; lists of records as counts."""
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        name = f"{before}{str(key).replace('_', ' ')}"
        if isinstance(value, dict):
            rows += flat_rows(value, f"{name}: ")
        elif isinstance(value, list | tuple) and any(isinstance(entry, dict | list | tuple) for entry in value):
            rows.append((name, f"{len(value)} entries in {FILE}"))
        else:
            rows.append((name, ", ".join(map(_shown, value)) if isinstance(value, list | tuple) else _shown(value)))
    return rows


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    return "".join(letter if letter.isprintable() else " " for letter in text)


def _source(base: str) -> str:
    """Return the Python expression from which PEFT's users load the base."""
    if HUB_ID.fullmatch(base):
        return f'"{base}"'
    try:
        bundled(base)
    except FileNotFoundError:
        return f'"path/to/{base}"'
    return f'duet_moe.bundled("{base}")'


def _table(values: Mapping[str, object]) -> str:
    rows = [" | ".join(cell.replace("|", "\\|") for cell in row) for row in flat_rows(values)]
    return "\n".join(["| | |", "|---|---|", *(f"| {row} |" for row in rows)]) if rows else "Not recorded."


def _utc_offset(created: str) -> timedelta | None:
    try:
        return datetime.fromisoformat(created).utcoffset()
    except ValueError:
        return None


def _check_base(base: Mapping[str, Any]) -> None:
    name, hashes = base.get("name"), base.get("hashes")
    if not isinstance(name, str) or not (_BASE_NAME.fullmatch(name) or HUB_ID.fullmatch(name)):
        raise ValueError(
            f"base name is {name!r:.80}; give a bundled name, the name of a folder (no path) or a Hub id."
        )
    if not isinstance(hashes, dict) or hashes.keys() != {"shared", "trunk"}:
        raise ValueError(f"base hashes are {hashes!r:.80}; give those of `base_hashes(model)`: shared and trunk.")
    for part, value in hashes.items():
        if not (value is None and part == "trunk") and not (isinstance(value, str) and _DIGEST.fullmatch(value)):
            raise ValueError(f"base hash {part} is {value!r:.80}; give 64 hexadecimal digits.")
