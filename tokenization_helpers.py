"""From texts to token ids: the retrieval prompt around a text (paper §3.1, §3.2) and the text's content words."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch

# The English stopwords of the PromptReps filter (the 179 words of NLTK's list).
STOPWORDS = frozenset(
    """
    i me my myself we our ours ourselves you you're you've you'll you'd your yours yourself yourselves he him his
    himself she she's her hers herself it it's its itself they them their theirs themselves what which who whom this
    that that'll these those am is are was were be been being have has had having do does did doing a an the and but
    if or because as until while of at by for with about against between into through during before after above below
    to from up down in out on off over under again further then once here there when where why how all any both each
    few more most other some such no nor not only own same so than too very s t can will just don don't should
    should've now d ll m o re ve y ain aren aren't couldn couldn't didn didn't doesn doesn't hadn hadn't hasn hasn't
    haven haven't isn isn't ma mightn mightn't mustn mustn't needn needn't shan shan't shouldn shouldn't wasn wasn't
    weren weren't won won't wouldn wouldn't
    """.split()
)
PUNCTUATION = frozenset("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")

# Sentences as NLTK's Punkt splits them without its trained lists: the last . ? or ! of a run of non-blanks ends one if
# white space or one of these follows; closing quotes and brackets before white space belong to the sentence they end.
_BREAKING = r"""[)";}\]*:@'({\[‘’“”«»?!]"""
_SENTENCE_END = re.compile(rf"(?<!\S)\S*[.?!](?={_BREAKING}|\s+(\S+))")
_INNER_END = re.compile(rf"[.?!](?:,|{_BREAKING})")
_CLOSERS = re.compile(r"[\"')\]}‘’“”«»]+?(?:\s+|(?=--)|$)", re.MULTILINE)
# An initial or a number before its full stop: a list's "3." or a middle "j." does not end a sentence in lowercase text.
_INITIAL_OR_NUMBER = re.compile(r"(?:^|--|[)\";}\]*:@({\[])[`,#&-]*(?:[^\W\d]|[.,]?\d[\d,.-]*)\.$")

# Penn Treebank word rules in the order and with the extensions of NLTK's word tokeniser, for lowercased sentences. Each
# has first what a sentence must hold for it to change anything: to look for that takes far less time than to try.
_Rules = list[tuple[tuple[str, ...], re.Pattern[str], str]]
_OPENING_QUOTES: _Rules = [
    (tuple("«“‘„`"), re.compile(r"([«“‘„]|`+)"), r" \1 "),
    (('"',), re.compile(r'^"'), "``"),
    (("``",), re.compile(r"(``)"), r" \1 "),
    (('"', "''"), re.compile(r"([ (\[{<])(\"|'{2})"), r"\1 `` "),
    (("'",), re.compile(r"(?i)(?<!\w)(')(?!(?:re|ve|ll|m|t|s|d|n)\b)(?=\w)"), r"\1 "),
]
_AFTER_FULL_STOP = "])}>\"'»”’ "  # what may stand between a sentence's full stop and its end
_PUNCTUATION_MARKS: _Rules = [
    ((":", ","), re.compile(r"([:,])([^\d])"), r" \1 \2"),
    ((":", ","), re.compile(r"([:,])$"), r" \1 "),
    (("..", *";@#$%&\u2012\u2013\u2014\u2015"), re.compile(r"(\.{2,}|[;@#$%&\u2012-\u2015])"), r" \1 "),
    (("?", "!"), re.compile(r"([?!])"), r" \1 "),
    (("' ",), re.compile(r"([^'])' "), r"\1 ' "),
    (("--", *"*[](){}<>"), re.compile(r"([*\[\](){}<>]|--)"), r" \1 "),
]
_CLOSING_QUOTES: _Rules = [
    (tuple("»”’"), re.compile(r"([»”’])"), r" \1 "),
    (("''", '"'), re.compile(r"''|\""), " '' "),
]
_AFTER_ONE_BLANK: _Rules = [  # for sentences whose white space is single blanks
    (("'",), re.compile(r"([^' ])('s|'m|'d|') "), r"\1 \2 "),
    (("'",), re.compile(r"([^' ])('ll|'re|'ve|n't) "), r"\1 \2 "),
    (("cannot",), re.compile(r"(?i)\b(can)(not)\b"), r" \1 \2 "),
    (("d'ye",), re.compile(r"(?i)\b(d)('ye)\b"), r" \1 \2 "),
    (("mme",), re.compile(r"(?i)\b(gim|lem)(me)\b"), r" \1 \2 "),
    (("gonna",), re.compile(r"(?i)\b(gon)(na)\b"), r" \1 \2 "),
    (("gotta",), re.compile(r"(?i)\b(got)(ta)\b"), r" \1 \2 "),
    (("more'n",), re.compile(r"(?i)\b(more)('n)\b"), r" \1 \2 "),
    (("wanna",), re.compile(r"(?i)\b(wan)(na)(?=\s)"), r" \1 \2 "),
    ((" 't",), re.compile(r"(?i) ('t)(is|was)\b"), r" \1 \2 "),
]


def split_words(text: str) -> list[str]:
    """Split a lowercased text into words and punctuation, as NLTK's `word_tokenize` does.

    >>> split_words("don't panic: it's 9.30 p.m.")
    ['do', "n't", 'panic', ':', 'it', "'s", '9.30', 'p.m', '.']
    """
    return [word for sentence in split_sentences(text) for word in sentence_words(sentence)]


def split_sentences(text: str) -> list[str]:
    """Split a lowercased text into sentences.

    >>> split_sentences('see fig. 3 ("why not?") or 3. of this list.')
    ['see fig.', '3 ("why not?")', 'or 3. of this list.']
    """
    sentences, start = [], 0
    for match in _SENTENCE_END.finditer(text):
        following = match.start(1) if match[1] else match.end()
        if _goes_on(match[0], match[1] or text[following]):
            continue
        end = match.end()
        if closers := _CLOSERS.match(text, following):
            end, following = following + len(closers[0].rstrip()), closers.end()
        sentences.append(text[start:end])
        start = following
    return [*sentences, text[start:].rstrip()]


def _goes_on(before: str, after: str) -> bool:
    """Whether a full stop between two runs of non-blanks ends no sentence: "3. item", "j. smith"."""
    if not (after[0].islower() or after[0] in ";:,!?"):
        return False
    # The last 64 characters alone, so that a hostile megabyte stays linear.
    if not _INITIAL_OR_NUMBER.search(before, max(0, len(before) - 64)):
        return False
    return not _INNER_END.search(before) and not _INNER_END.search(after)


def sentence_words(sentence: str) -> list[str]:
    """Split one lowercased sentence into words and punctuation, as NLTK's `NLTKWordTokenizer` does."""
    sentence = _rewritten(sentence, _OPENING_QUOTES)
    body = sentence.rstrip().rstrip(_AFTER_FULL_STOP)
    if len(body) > 1 and body[-1] == "." and body[-2] != ".":
        sentence = f"{body[:-1]} . {sentence[len(body) :]} "
    sentence = _rewritten(_rewritten(sentence, _PUNCTUATION_MARKS), _CLOSING_QUOTES)
    return _rewritten(f" {' '.join(sentence.split())} ", _AFTER_ONE_BLANK).split()


def _rewritten(sentence: str, rules: _Rules) -> str:
    """Apply rules one after the other."""
    for needed, pattern, replacement in rules:
        for part in needed:
            if part in sentence:
                sentence = pattern.sub(replacement, sentence)
                break
    return sentence


def content_words(text: str) -> list[str]:
    """Return the words that may carry sparse weight: lowercase, no stopwords, no punctuation (paper §3.3).

    >>> content_words("What causes the seasons on Earth?")
    ['causes', 'seasons', 'earth']
    """
    return [word for word in split_words(text.lower()) if word not in STOPWORDS and word not in PUNCTUATION]


def without_lone_surrogates(text: str) -> str:
    """Replace what UTF-8 cannot hold by U+FFFD; surrogate pairs become their character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


class PromptLayout:
    """The fixed parts of one side's sequence: prefix + text (at most `room` tokens) + suffix + [MASK]·K + tail."""

    def __init__(self, prefix: list[int], suffix: list[int], room: int, masks: Sequence[int], tail: list[int]) -> None:
        self.prefix, self.suffix, self.room = prefix, suffix, room
        self.num_masks, self.num_tail = len(masks), len(tail)
        self.closing = [*suffix, *masks, *tail]  # all that follows the text


class PreparedText(NamedTuple):
    """One text as a model reads it.

    Args:
        sequence: ids of the whole sequence, unpadded.
        text_ids: those of the text in it.
        cut: whether the text has more tokens than these.
        content: sorted ids of the content words of what is left of the text, the vocabulary of its sparse vector; None
            lets the whole vocabulary in.
    """

    sequence: list[int]
    text_ids: list[int]
    cut: bool
    content: list[int] | None


class FramedTokenizer:
    """Puts a layout around texts, in which nothing is a special token, and finds the texts again.

    Args:
        tokenizer: a transformers fast tokenizer with an end-of-text token.

    Attributes:
        layouts: that of queries (True) and of passages (False); who derives from this class fills it.
        mask_id: of the [MASK] token; None for a model without.

    Raises:
        ValueError: no fast tokenizer, or no end-of-text token.
    """

    WORD_CACHE_SIZE = 200_000
    LONGEST_BEGINNING = 1 << 18  # characters; of an endless word the first ids are those of so much of it

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.layouts: dict[bool, PromptLayout] = {}
        self.mask_id: int | None = None
        self._plain = _plain_backend(tokenizer)
        self.end_of_text_id = _special_id(tokenizer, "end-of-text", (tokenizer.eos_token, "<|endoftext|>"))
        self.pad_id = self.end_of_text_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self._word_ids: dict[str, list[int]] = {}

    def _plain_ids(self, text: str) -> list[int]:
        with in_words(self.tokenizer):
            return self._plain.encode(text, add_special_tokens=False).ids

    def _prompt_ids(self, parts: tuple[str, str]) -> list[list[int]]:
        """Return the ids before and after the text, each part of the prompt tokenised as one string."""
        with in_words(self.tokenizer):
            return [self.tokenizer(part, add_special_tokens=False)["input_ids"] for part in parts]

    def prepare(self, texts: Sequence[str], is_query: bool, content_filter: bool = True) -> list[PreparedText]:
        """Return all that a model needs to know of texts. Special-token strings in a text stay plain text.

        Args:
            texts: any number of strings.
            is_query: the side.
            content_filter: False leaves the content words out.
        """
        prepared = []
        for ids in self.first_ids(texts, max(layout.room for layout in self.layouts_of(is_query)) + 1):
            layout = self.layout_for(ids, is_query)
            kept = ids[: layout.room]
            content = self.content_ids(self.text_of(kept)) if content_filter else None
            sequence = layout.prefix + kept + layout.closing
            prepared.append(PreparedText(sequence, kept, len(ids) > layout.room, content))
        return prepared

    def layouts_of(self, is_query: bool) -> list[PromptLayout]:
        """Return all layouts that a text of a side may have."""
        return [self.layouts[is_query]]

    def layout_for(self, ids: Sequence[int], is_query: bool) -> PromptLayout:
        """Return the layout of a text by its tokens, of which those behind the shortest room are not looked at."""
        return self.layouts[is_query]

    def tokenize(self, texts: Sequence[str], is_query: bool) -> list[list[int]]:
        """Return the whole sequence of each text, unpadded."""
        return [text.sequence for text in self.prepare(texts, is_query, content_filter=False)]

    def first_ids(self, texts: Sequence[str], count: int) -> list[list[int]]:
        """Return the first `count` ids of each text alone, without tokenising the rest of a long one."""
        texts = [without_lone_surrogates(text) for text in texts]
        length = 8 * count + 56  # characters; twice as many as `count` tokens of English take
        short = [text if len(text) <= length else "" for text in texts]
        long = [row for row, text in enumerate(texts) if len(text) > length]
        with in_words(self.tokenizer):
            rows = [encoding.ids[:count] for encoding in self._plain.encode_batch_fast(short, add_special_tokens=False)]
            encodings = self._plain.encode_batch([texts[row][:length] for row in long], add_special_tokens=False)
            for row, encoding in zip(long, encodings, strict=True):
                text, tried, longest = texts[row], length, max(self.LONGEST_BEGINNING, 16 * length)
                while tried < min(len(text), longest):
                    words = encoding.word_ids
                    # The cut may change the last words' tokens.
                    if len(words) > count and words[count] <= words[-1] - 2:
                        break
                    tried = min(8 * tried, longest)
                    encoding = self._plain.encode(text[:tried], add_special_tokens=False)
                rows[row] = encoding.ids[:count]
        return rows

    def pad(self, sequences: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Left-pad sequences to the longest.

        Returns:
            ids and attention mask, LongTensor [B, L] each, on the CPU.
        """
        length = max(map(len, sequences))
        rows = [[self.pad_id] * (length - len(row)) + list(row) for row in sequences]
        ids = torch.from_numpy(np.array(rows, dtype=np.int64))  # in a fifth of the time of torch.tensor
        if len(rows) == 1:
            return ids, torch.ones_like(ids)
        lengths = np.array([len(row) for row in sequences])
        return ids, torch.from_numpy((np.arange(length) >= (length - lengths)[:, None]).astype(np.int64))

    def mask_positions(self, ids: torch.Tensor, is_query: bool) -> torch.Tensor:
        """Return where the masks of left-padded sequences [B, L] of one side are: int64 [B, 0], for want of any."""
        # "cpu", here and below: a caller may have set another device as torch's default
        return torch.empty(len(ids), 0, dtype=torch.long, device="cpu")

    def locate(self, ids: torch.Tensor, mask: torch.Tensor, is_query: bool) -> tuple[torch.Tensor, list[list[int]]]:
        """Check that the rows are sequences of this side, and find their masks and texts.

        Args:
            ids: int64 [B, L] on the CPU, padded on either side.
            mask: [B, L] on the CPU, 1 for real tokens.
            is_query: which side the rows are to be.

        Returns:
            Positions of the masks, int64 [B, K], as `mask_positions`, and the token ids of each text.

        Raises:
            ValueError: a row is not what `tokenize` makes for this side; the message names the row.
        """
        most = max(layout.num_masks for layout in self.layouts_of(is_query))
        texts: list[list[int]] = []
        positions: list[list[int]] = []
        for number, (row, real) in enumerate(zip(ids.tolist(), (mask != 0).tolist(), strict=True)):
            start = real.index(1) if 1 in real else 0
            end = start + sum(real)
            if real[start:end] != [1] * (end - start):
                raise ValueError(
                    f"attention mask row {number} is not one run of ones; it must be what tokenize() made."
                )
            found = self._text_in(row[start:end], is_query)
            if found is None:
                raise ValueError(self._misfit(number, row[start:end], is_query))
            layout, text = found
            first_mask = start + len(layout.prefix) + len(text) + len(layout.suffix)
            last_mask = first_mask + layout.num_masks - 1
            positions.append([min(first_mask + place, last_mask) for place in range(most)])
            texts.append(text)
        return torch.tensor(positions, device="cpu"), texts

    def _text_in(self, row: list[int], is_query: bool) -> tuple[PromptLayout, list[int]] | None:
        """Return the layout of an unpadded sequence and the text in it; None where it is not of this side."""
        for layout in self.layouts_of(is_query):
            start, end = len(layout.prefix), len(row) - len(layout.closing)
            if start <= end and row[:start] == layout.prefix and row[end:] == layout.closing:
                text = row[start:end]
                return (layout, text) if self.layout_for(text, is_query) is layout else None
        return None

    def _misfit(self, number: int, row: list[int], is_query: bool) -> str:
        side, other = ("query", "passage") if is_query else ("passage", "query")
        other_layout = self.layouts[not is_query]
        budgets = sorted({layout.num_masks for layout in self.layouts_of(is_query)})
        found, expected = sum(token == self.mask_id for token in row), " or ".join(map(str, budgets))
        made_with = f"tokenize(..., is_query={is_query})"
        if row[: len(other_layout.prefix)] == other_layout.prefix and found == other_layout.num_masks:
            return f"ids row {number} is a {other}, but encode() was told is_query={is_query}; use {made_with}."
        if found not in budgets:
            return (
                f"ids row {number} holds {found} [MASK] tokens (id {self.mask_id}); a {side} of this model has "
                f"{expected}. Make the ids with {made_with} of the same model."
            )
        return f"ids row {number} does not have this model's {side} prompt around its text; use {made_with}."

    def text_of(self, text_ids: Sequence[int]) -> str:
        """Return the text of token ids; a character cut in two by truncation is left out."""
        with in_words(self.tokenizer):
            text = self._plain.decode(list(text_ids), skip_special_tokens=False)
        return text.rstrip("\N{REPLACEMENT CHARACTER}")

    def content_ids(self, text: str) -> list[int]:
        """Return the sorted ids of a text's content words, each word tokenised on its own, the mask id left out."""
        found: set[int] = set()
        for word in content_words(without_lone_surrogates(text)):
            ids = self._word_ids.get(word)
            if ids is None:
                if len(self._word_ids) >= self.WORD_CACHE_SIZE:
                    self._word_ids.clear()
                ids = self._word_ids[word] = self._plain_ids(word)
            found.update(ids)
        return sorted(found - {self.mask_id})

    def content_lists(self, text_ids: Sequence[Sequence[int]]) -> list[list[int]]:
        """Return `content_ids` of each text, as it was cut."""
        return [self.content_ids(self.text_of(ids)) for ids in text_ids]


class RetrievalTokenizer(FramedTokenizer):
    """Builds the sequences that the model reads, and finds text and masks in them again.

    Args:
        tokenizer: a transformers fast tokenizer with mask, end-of-turn and end-of-text tokens.
        config: the release's `DiffRetrieverConfig`.
        prompts: the texts before and after a query (True) and a passage (False) with K masks, from `render_prompts`.

    Raises:
        ValueError: no fast tokenizer, no mask token, or `max_length` leaves no room for text.
    """

    mask_id: int

    def __init__(self, tokenizer: Any, config: Any, prompts: Mapping[tuple[bool, int], tuple[str, str]]) -> None:
        mask_id = find_mask_id(tokenizer, config.mask_token)
        super().__init__(tokenizer)
        self.mask_id, self.max_length = mask_id, config.max_length
        end_of_turn = _special_id(tokenizer, "end-of-turn", ("<|eot_id|>", "<|im_end|>"))
        tail = [*self._plain_ids('"'), end_of_turn, self.end_of_text_id]  # paper Eq. 1
        made = {
            (is_query, k): self._layout(is_query, k, parts, config.text_length(is_query), tail)
            for (is_query, k), parts in prompts.items()
        }
        self.layouts = {True: made[True, config.num_query_masks], False: made[False, config.num_passage_masks]}
        self._chosen = {k: made[True, k] for k in config.budgets(is_query=True)}
        self._choose: Callable[[Sequence[int]], int] = config.query_budget
        self._least_room = min(layout.room for layout in self._chosen.values())

    def _layout(
        self, is_query: bool, k: int, parts: tuple[str, str], room: int | None, tail: list[int]
    ) -> PromptLayout:
        """Return the layout of a side's texts with K masks; `room` None leaves it to `max_length`."""
        side = "query" if is_query else "passage"
        prefix, suffix = self._prompt_ids(parts)
        if self.mask_id in (*prefix, *suffix):
            raise ValueError(f"The {side} prompt holds the token that serves as [MASK] (id {self.mask_id}).")
        length = len(prefix) + len(suffix)
        if room is None and self.max_length <= length:
            raise ValueError(
                f"config field `max_length` is {self.max_length}, but the {side} prompt alone takes {length} "
                f"tokens; set it to at least {length + 1}, better {length + 100}."
            )
        return PromptLayout(prefix, suffix, room or self.max_length - length, [self.mask_id] * k, tail)

    def mask_positions(self, ids: torch.Tensor, is_query: bool) -> torch.Tensor:
        """Return where the masks of left-padded sequences [B, L] of one side are, int64 [B, K] on the CPU.

        Behind the last mask of a row with fewer than K it is repeated.
        """
        layouts = self.layouts_of(is_query)
        end, most = ids.shape[1] - layouts[0].num_tail, max(layout.num_masks for layout in layouts)
        if len(layouts) == 1:
            return torch.arange(end - most, end, device="cpu").repeat(len(ids), 1)
        first = end - (ids == self.mask_id).sum(dim=1, keepdim=True)  # no text holds the mask's id
        return (first + torch.arange(most, device="cpu")).clamp(max=end - 1)

    def layouts_of(self, is_query: bool) -> list[PromptLayout]:
        """Return all layouts that a text of a side may have: one for each K_q of the table."""
        return list(self._chosen.values()) if is_query else [self.layouts[False]]

    def layout_for(self, ids: Sequence[int], is_query: bool) -> PromptLayout:
        """Return the layout of a text: of a query by the table of budgets, where the release has one (paper §6.3)."""
        return self._chosen[self._choose(ids[: self._least_room])] if is_query else self.layouts[False]


def _plain_backend(tokenizer: Any) -> Any:
    """Return the tokenizer's own rules without its added tokens, so that no text can become a special id."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(f"The tokenizer of {tokenizer.name_or_path!r} is not a fast tokenizer (tokenizer.json).")
    with in_words(tokenizer):
        rules = json.loads(backend.to_str())
        rules.update(added_tokens=[], post_processor=None, truncation=None, padding=None)
        return type(backend).from_str(json.dumps(rules))


@contextmanager
def in_words(tokenizer: Any) -> Iterator[None]:
    """Raise ValueError, naming the tokenizer, for what the tokenizers library raises: plain Exceptions, and panics."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(
            f"The tokenizer of {tokenizer.name_or_path!r} (tokenizer.json, tokenizer_config.json) cannot be used: "
            f"{type(error).__name__}: {error!s:.200}."
        ) from error


def name_mask_token(tokenizer: Any, mask_token: str | None, has_own: bool) -> None:
    """Give a tokenizer the [MASK] that a release names, where its backbone has none.

    Args:
        tokenizer: of a backbone.
        mask_token: one of its special tokens; None leaves the tokenizer as it is.
        has_own: whether the backbone was trained with a mask token of its own, as LLaDA and Dream were.

    Raises:
        ValueError: none is named where one must be; or no special token, or one that is in use.
    """
    if has_own:
        if mask_token is not None:
            raise ValueError(f"config field `mask_token` is {mask_token!r}, but the backbone has a [MASK] of its own.")
        return
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    named = {name: token for name, token in tokenizer.special_tokens_map.items() if name != "mask_token"}
    used = [word for token in named.values() for word in ([token] if isinstance(token, str) else token)]
    free = [token for token in special if token not in used] or ["none of them"]
    choice = f"an unused special token of the tokenizer of {tokenizer.name_or_path!r}, such as {', '.join(free[-3:])}"
    if (mask_token or tokenizer.mask_token) is None:
        raise ValueError(f"The backbone has no [MASK] token; name one as `mask_token`: {choice}.")
    if mask_token is not None and (mask_token not in special or mask_token in named.values()):
        problem = "is in use" if mask_token in special else "is no special token"
        raise ValueError(f"config field `mask_token`: {mask_token!r} {problem}; choose {choice}.")
    tokenizer.mask_token = mask_token or tokenizer.mask_token


def find_mask_id(tokenizer: Any, named: str | None = None) -> int:
    """Return the id of the mask token, LLaDA's, Dream's or the one that was named, or raise ValueError."""
    return _special_id(tokenizer, "[MASK]", (named, "<|mdm_mask|>", "<|mask|>", tokenizer.mask_token))


def _special_id(tokenizer: Any, role: str, names: tuple[str | None, ...]) -> int:
    """Return the id of the first of `names` that the tokenizer has as one token."""
    vocabulary = tokenizer.get_vocab()
    for name in names:
        if name is not None and name in vocabulary:
            return vocabulary[name]
    tried = ", ".join(name for name in names if name)
    raise ValueError(f"The tokenizer of {tokenizer.name_or_path!r} has no {role} token (looked for {tried}).")
