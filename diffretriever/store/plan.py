"""What an unfinished store is to become: its settings, and the corpus cut into shards."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

from ..data.corpus import Passage, Query
from ..data.ids import find_repeated, repeated_hashes
from ..files.claims import living_owners
from ..files.durable import write_whole
from ..files.fields import fill
from ..files.hashes import hash64, hash_json
from .manifest import Manifest, Settings, check_numbers, flat, is_recorded_only, json_bytes, read_json
from .shard_file import DamagedShardError, ShardFile, texts_digest

PLAN_FILE = "plan.json"
CLAIMS_FOLDER = "claims"
SHARD_NAME = "shard-{:06d}.safetensors"
MAX_SHARDS = 1_800_000  # whose manifest is just below `manifest.LARGEST`
Text = Passage | Query


@dataclass(frozen=True)
class Survey:
    """A corpus, read once.

    Args:
        count: texts in it.
        digests: the hash of the ids and texts of each shard.

    Raises:
        ValueError: there is no text.
    """

    count: int
    digests: tuple[str, ...]

    def __post_init__(self) -> None:
        check_numbers(self, {"count": 1})


@dataclass(frozen=True)
class Plan:
    """What an unfinished store is to become; plan.json.

    Args:
        settings: as in the manifest.
        survey: of the corpus.
        shard_size: texts a shard; the last may have fewer.

    Raises:
        ValueError: the shards do not hold the texts.
    """

    settings: Settings
    survey: Survey
    shard_size: int

    def __post_init__(self) -> None:
        check_numbers(self, {"shard_size": 1})
        if self.shards != -(-self.survey.count // self.shard_size):
            raise ValueError(f"{self.survey.count} texts, {self.shard_size} a shard, do not make {self.shards} shards")

    @property
    def shards(self) -> int:
        """Shards of the whole store."""
        return len(self.survey.digests)

    def shard_count(self, number: int) -> int:
        """Return the number of texts in a shard."""
        return min(self.shard_size, self.survey.count - number * self.shard_size)

    def shards_of(
        self, texts: Iterable[Text], source: str, folder: Path, numbers: range | None = None
    ) -> Iterator[tuple[int, list[Text]]]:
        """Cut a corpus into the plan's shards, and see that it is the plan's corpus as far as it is read.

        Args:
            texts: of these shards; of the last one, with what follows.
            source: the corpus's name, for messages.
            folder: the store's, for messages.
            numbers: of consecutive shards; None is all of them.

        Yields:
            A shard's number and its texts.

        Raises:
            ValueError: the corpus is another.
        """
        other = f"{folder}: the store there is of another corpus: it has {self.survey.count} texts, {source}"
        advice = "Encode a changed corpus into another folder."
        numbers = range(self.shards) if numbers is None else numbers
        count = numbers.start * self.shard_size
        for number, chunk in cut(texts, self.shard_size, numbers.start):
            planned = self.shard_count(number)  # 0 or less behind the last shard
            if len(chunk) > planned:
                raise ValueError(f"{other} has more. {advice}")
            if len(chunk) == planned:
                if _digest(chunk) != self.survey.digests[number]:
                    raise ValueError(f"{other} differs in texts {count + 1} to {count + planned}. {advice}")
                yield number, chunk
            count += len(chunk)
        if count < min(numbers.stop * self.shard_size, self.survey.count):
            raise ValueError(f"{other} has {count}. {advice}")

    def open_shard(self, folder: Path, number: int) -> ShardFile | None:
        """Return the file of a shard, its data unread; None where there is none.

        Raises:
            DamagedShardError: it is no shard, or that of another store.
        """
        path = folder / SHARD_NAME.format(number)
        if not path.exists():
            return None
        file = ShardFile(path)
        strange = [name for name, value in self.metadata(number).items() if file.metadata.get(name) != value]
        if strange:
            raise DamagedShardError(f"{path}: not of this store ({', '.join(strange)} differ).")
        return file

    def metadata(self, number: int) -> dict[str, str]:
        """Return what the header of a shard of this store says."""
        return {
            "first": str(number * self.shard_size),
            "count": str(self.shard_count(number)),
            "settings_sha256": self._settings_digest,
            "texts_sha256": self.survey.digests[number],
        }

    @cached_property
    def _settings_digest(self) -> str:
        """The hash of the settings that change what is in a store."""
        values = {name: value for name, value in flat(asdict(self.settings)).items() if not is_recorded_only(name)}
        return hash_json(values)

    def write(self, folder: Path) -> None:
        """Write plan.json unless another process has."""
        content = {"settings": asdict(self.settings), "shard_size": self.shard_size, "survey": asdict(self.survey)}
        write_whole(folder / PLAN_FILE, [json_bytes(content)], keep=True)

    @classmethod
    def read(cls, folder: Path) -> Plan | None:
        """Return the plan of a folder, from plan.json or, for a finished store, from its manifest.

        Returns:
            None where the folder holds neither.

        Raises:
            ValueError: the file is damaged or of another format.
        """
        try:
            manifest = Manifest.read(folder)
            survey = Survey(manifest.count, tuple(shard.texts_sha256 for shard in manifest.shards))
        except FileNotFoundError:
            return cls._read_file(folder / PLAN_FILE)
        try:
            return cls(manifest.settings, survey, manifest.options.get("shard_size", 0))
        except ValueError as error:
            raise ValueError(
                f"{folder}: this store was not made by `diffretriever encode` and cannot be mended ({error})."
            ) from error

    @classmethod
    def _read_file(cls, file: Path) -> Plan | None:
        try:
            return fill(cls, read_json(file), str(file), others=True)
        except FileNotFoundError:
            return None


def cut(texts: Iterable[Text], shard_size: int, first: int = 0) -> Iterator[tuple[int, list[Text]]]:
    """Yield (shard number, its texts), the numbers from `first` on."""
    stream = iter(texts)
    while chunk := list(islice(stream, shard_size)):
        yield first, chunk
        first += 1


def survey_texts(read: Callable[[], Iterable[Text]], shard_size: int, source: str) -> Survey:
    """Read a corpus once; memory holds 8 bytes a text.

    Args:
        read: begins to read it anew.
        shard_size: texts a shard.
        source: its name, for messages.

    Returns:
        Its size and the hash of each shard's texts.

    Raises:
        ValueError: it is empty, or ids occur twice; and what reading it raises.
    """
    return join_surveys(map(survey_shard, (chunk for _, chunk in cut(read(), shard_size))), read, source)


def survey_shard(texts: Sequence[Text]) -> tuple[str, array[int]]:
    """Return the hash of one shard's ids and texts, and a 63-bit hash of each id."""
    return _digest(texts), array("q", (hash64(text.id) for text in texts))


def _digest(texts: Sequence[Text]) -> str:
    return texts_digest([text.id for text in texts], [text.text for text in texts])


def join_surveys(shards: Iterable[tuple[str, array[int]]], read: Callable[[], Iterable[Text]], source: str) -> Survey:
    """Return the survey of a corpus from those of its shards.

    Args:
        shards: of `survey_shard`, in order.
        read: begins to read the corpus; called only where ids seem to occur twice.
        source: its name, for messages.

    Raises:
        ValueError: as `survey_texts`.
    """
    digests, hashes = [], array("q")
    for digest, ids in shards:
        digests.append(digest)
        hashes.extend(ids)
    if not hashes:
        raise ValueError(f"{source}: no texts; expected at least one.")
    suspects = repeated_hashes(hashes)
    if len(suspects) and (repeated := find_repeated((text.id for text in read()), suspects)):
        shown = "; ".join(f"{text_id!r} (texts {first} and {second})" for text_id, first, second in repeated)
        raise ValueError(f"{source}: ids occur twice, counted from 1: {shown}. Each text needs an id of its own.")
    if len(digests) > MAX_SHARDS:
        raise ValueError(
            f"{source}: {len(hashes):,} texts are {len(digests):,} shards; a store has at most {MAX_SHARDS:,}. Give a "
            "larger --shard-size."
        )
    return Survey(len(hashes), tuple(digests))


def describe_unfinished(folder: Path) -> str | None:
    """Say how far the making of a store has come, for one who wants to read it; None where none was begun."""
    plan = Plan.read(folder) if (folder / PLAN_FILE).is_file() else None
    if plan is None:
        return None
    there = sum((folder / SHARD_NAME.format(number)).is_file() for number in range(plan.shards))
    owners = living_owners(folder / CLAIMS_FOLDER)
    state = f"it is being written (locked) by {', '.join(owners)}" if owners else "nobody is writing it now"
    return (
        f"{folder}: the store is not finished, {there} of {plan.shards} shards are there; {state}. Run the same "
        "`diffretriever encode` command to finish it."
    )
