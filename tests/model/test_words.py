"""Words and content words against NLTK's own tokenisers."""

from __future__ import annotations

import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from nltk.tokenize import NLTKWordTokenizer
from nltk.tokenize.punkt import PunktSentenceTokenizer

from diffretriever.model.tokenization_helpers import (
    PUNCTUATION,
    STOPWORDS,
    content_words,
    sentence_words,
    split_sentences,
    split_words,
)

pytestmark = pytest.mark.once

PUNKT, TREEBANK = PunktSentenceTokenizer(), NLTKWordTokenizer()

SENTENCES = [
    "",
    " ",
    "\n",
    "don't panic: it's 9.30 p.m.",
    "cannot, can't, won't've, shan't; i'll you're they've he'd i'm",
    "gonna wanna gotta gimme lemme d'ye more'n wanna? gonna-be",
    "'tis the season, 'twas the night; it 'tis so",
    "'quoted' and ''double'' and 'unfinished",
    '"quoted" and "un finished',
    '("nested" [brackets {of <every> kind}])',
    "“curly” ‘single’ «guillemets» „low” it’s ’tis",
    "`back` ``tick'' ```three```",
    "wait... what.... no.. yes…",
    "a -- b --- c – d — e ― f a--b a—b",
    "it costs $3.88, £5, 3,000.50€ or 50% (#1 @home & away)",
    "see https://example.org/a?b=c&d=e#f or mail foo@bar.com.",
    "the u.s. e.g. i.e. etc. dr. ph.d. vs. j.r.r.",
    "what?! no!!! yes?? ok!?",
    "time 10:30, ratio 3:4, a:b, a: b ,c,d , e:",
    "trailing colon:",
    "trailing comma,",
    "ends in a bracket.)",
    "ends in quotes.'\" ",
    "ends in a curly quote.”",
    "a full stop before a blank line.\n\n)",
    "dogs' tails and james's hat, the 90's 'n' roll o'clock",
    "c++ c# .net node.js *bold* _under_ ~tilde~ ^caret | pipe \\ back/slash",
    "naïve café ÉCOLE straße ﬁne ﷽ 日本語。テキスト، العربية؟ हिन्दी।",
    "emoji 😀👍🏽 zwj 👩‍👩‍👧 flag 🇫🇷",
    "non\u00a0breaking\u2009thin\u200bzero\u3000wide\ttab\x85next\x1cfile",
    "ſ long s: 'ſ 'ſ can't'ſ ('s)",
    "............'''''''\"\"\"\"\"\"\"----,,,,::::",
]
TEXTS = [
    "The first sentence ends. The second does not end here, e.g. because of that. Third?",
    'Dr. J. Smith (b. 1944) went to No. 10. He said: "I can\'t." Then he left.',
    "1. First item. 2. Second item. 3.1. Third.\n4.) fourth.",
    "He left (at last.) She stayed. (Really.)",
    'She asked, "why?" "Because." He nodded... and left.',
    'Use foo.(txt) or bar.[1] and baz.\'s; also qux."x" etc.) done.',
    "It was the 90's. Don't use the API's. I'm at the file's.",
    "The U.S. economy grew 3.5 percent. In 2004. it fell. In 2005. 'twas better!",
    "Prices: $1.99. That's 20% off... wait?! No.",
    "“Curly.” She said. ‘Single.’ «Guillemets.» Fin.",
    "No end\n\nA new paragraph.\r\nAnother -- with dashes. -- and more.",
    "   leading blanks. trailing blanks.   ",
    "a. b. c. d. e. , f. ; 7. : g. ( h.",
    "see section 3, p. 44. the end. v. 2.0. 5. ! x",
    "日本語。 Text. Más texto. ¿Qué? العربية. Ещё. и вот",
    ".",
    "...",
    ". . . .",
    "",
    "?.!.'.",
    'e.g.: i.e.; a.m.) p.m.] q.e.d.} "x."',
]


def nltk_words(text: str) -> list[str]:
    return [word for sentence in PUNKT.tokenize(text) for word in TREEBANK.tokenize(sentence)]


@pytest.mark.parametrize("sentence", SENTENCES)
def test_words_of_hard_sentences(sentence: str) -> None:
    assert sentence_words(sentence.lower()) == TREEBANK.tokenize(sentence.lower())


PIECES = [
    *" .,:;?!'\"`-()[]{}<>«»“”‘’„…–—*&%$#@/\\_\n\t\u00a0",
    *("..", "...", "''", "``", "--", ". ", "' ", '." ', ".) ", "'s", "n't", "'ll", "'re", "'ve", "'d", "'m", "'t"),
    *("can", "not", "cannot", "gonna", "wanna", "gotta", "gimme", "lemme", "more'n", "d'ye", "'tis", "'twas"),
    *("a", "b.", "word", "words.", "1", "2.5", "3,000", "u.s.", "é", "日本", "ſ", "ı", "😀"),
]
# NLTK's newest versions count marks and joiners as letters, older ones and Python's `re` do not: leave those out.
any_text = st.text(st.characters(exclude_categories=["Mn", "Mc", "Me", "Cf", "Cs", "Co", "Cn"]), max_size=40)
hard_text = st.lists(st.sampled_from(PIECES), max_size=25).map("".join)


@settings(max_examples=1500, deadline=None, derandomize=True)
@given(st.one_of(hard_text, any_text))
def test_words_of_any_sentence(sentence: str) -> None:
    assert sentence_words(sentence.lower()) == TREEBANK.tokenize(sentence.lower())


@pytest.mark.parametrize("text", TEXTS)
def test_words_of_whole_texts(text: str) -> None:
    assert split_words(text.lower()) == nltk_words(text.lower())


plain_words = st.sampled_from(
    """
    the The cat Dr. J. 3. 44 3.5. end. end? end! (so.) "so." 'so.' so... e.g. i.e., it's. can't etc.) -- : 90's. x
    """.split()
)


@settings(max_examples=1500, deadline=None, derandomize=True)
@given(st.lists(plain_words, max_size=12).map(" ".join))
@example("a. b")
def test_words_of_any_prose(text: str) -> None:
    assert split_words(text.lower()) == nltk_words(text.lower())


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.one_of(hard_text, any_text))
def test_no_character_is_lost_between_sentences(text: str) -> None:
    assert "".join("".join(split_sentences(text)).split()) == "".join(text.split())


@pytest.mark.parametrize("text", [*SENTENCES, *TEXTS])
def test_content_words_are_nltk_words_without_stopwords_and_punctuation(text: str) -> None:
    expected = [word for word in nltk_words(text.lower()) if word not in STOPWORDS and word not in PUNCTUATION]
    assert content_words(text) == expected


def test_content_words_of_a_sentence() -> None:
    text = "The Eiffel Tower, which ISN'T in London, was built by Gustave Eiffel's company in 1889."
    assert content_words(text) == [
        *("eiffel", "tower", "n't", "london", "built", "gustave", "eiffel", "'s", "company", "1889"),
    ]


def test_stopwords_are_the_179_of_nltk() -> None:
    assert len(STOPWORDS) == 179
    assert {"the", "don't", "wouldn", "won't", "yourselves", "s", "ll"} <= STOPWORDS
    assert not {"us", "within", "would", "could", "may"} & STOPWORDS


MEGABYTE = 1_000_000


@pytest.mark.slow
@pytest.mark.parametrize("unit", [*" \"'.`-(“\n", "''", ".'", ".)", "a' ", "a,", "1.,", "--1"])
@pytest.mark.parametrize("frame", ["{}", "a.){} b. c"], ids=["bare", "framed"])
def test_hostile_megabytes_take_linear_time(unit: str, frame: str) -> None:
    # Linear rules take about a second for a megabyte; a quadratic one takes hours, and minutes for an eighth of it.
    size = MEGABYTE if frame == "{}" and unit in " \"'." else MEGABYTE // 8
    text = frame.format((unit * size)[:size])
    start = time.process_time()
    split_words(text)
    assert time.process_time() - start < 5
