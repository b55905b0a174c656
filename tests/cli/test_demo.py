"""`diffretriever demo` with the shipped release: its answers in the terminal, their explanation, and the page."""

from __future__ import annotations

import io
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import torch
from transformers import AutoModel

from diffretriever import shipped_release
from diffretriever.cli.demo import SHIPPED
from diffretriever.cli.display import text_width
from diffretriever.cli.main import main
from diffretriever.cli.page import PageServer, render_page, serve
from diffretriever.search.explain import Explainer, Explanation
from diffretriever.store.identity import describe_model
from diffretriever.store.store import ShardContents, write_store

TEXTS = [
    'A program that plays Chess ("the game") against a human opponent.',
    "Plays MP3 and Ogg Vorbis audio files.",
    "A spelling <b>checker</b> <script>alert(1)</script> & more, İstanbul included.",
]
QUESTION = "Chess playing program"


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModel.from_pretrained(shipped_release(SHIPPED), trust_remote_code=True)


@pytest.fixture(scope="module")
def passages(model: Any) -> Any:
    return model.encode_texts(TEXTS, is_query=False)


@pytest.fixture(scope="module")
def explainer(model: Any, passages: Any) -> Explainer:
    return Explainer(model, passages, ids=["chess", "<i>music</i>", "checker"], texts=TEXTS)


@pytest.fixture(scope="module")
def found(explainer: Explainer) -> Explanation:
    return explainer.explain(QUESTION)


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    (tmp_path / "notes.txt").write_text("\n".join(TEXTS))
    return tmp_path / "notes.txt"


def run(*arguments: object) -> int:
    return main(["demo", *map(str, arguments)])


# ---------------------------------------------------------------------------------------------- explanations


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_an_explanation_has_the_scores_of_model_score(
    model: Any, passages: Any, explainer: Explainer, weight: float
) -> None:
    query = model.encode_texts([QUESTION], is_query=True)
    dense, sparse = (model.score(query, passages, mode)[0] for mode in ("multi_dense", "sparse_max"))
    both = zip(dense.tolist(), sparse.tolist(), strict=True)
    expected = {text: pytest.approx(pair, abs=1e-5) for text, pair in zip(TEXTS, both, strict=True)}
    matches = explainer.explain(QUESTION, weight=weight).matches
    assert {match.text: (match.dense, match.sparse) for match in matches} == expected
    order = {0.0: sparse, 1.0: dense, 0.5: model.score(query, passages, "fusion_multi_sparse_max")[0]}[weight]
    assert [match.text for match in matches] == [TEXTS[row] for row in order.argsort(descending=True, stable=True)]
    assert len(explainer.explain(QUESTION, top_k=2).matches) == 2


def test_the_weight_is_the_models_own(
    model: Any, explainer: Explainer, monkeypatch: pytest.MonkeyPatch, notes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    half = [match.fused for match in explainer.explain(QUESTION).matches]
    monkeypatch.setattr(model.config, "recommended_fusion_weight", 0.9)
    own = [match.fused for match in explainer.explain(QUESTION).matches]
    assert own == [match.fused for match in explainer.explain(QUESTION, weight=0.9).matches] != half
    assert [match.fused for match in explainer.explain(QUESTION, weight=0.5).matches] == half


def test_the_map_and_the_shared_words_make_the_two_scores(found: Explanation) -> None:
    """ "Chess" and "program" are a token each, so that their weights' products are the sparse score."""
    query = {word.text: word.weight for word in found.words}
    assert list(query) == ["chess", "playing", "program"]
    for match in found.matches:
        assert match.dense == pytest.approx(match.similarity.amax(dim=1).mean().item(), abs=1e-5)
        shared = [word for word in match.words if word.shared]
        assert match.sparse == pytest.approx(sum(word.weight * query[word.text] for word in shared), abs=1e-4)
    first = found.matches[0]
    assert [word.text for word in first.words if word.shared] == ["chess", "program"]
    assert {part.text: part.shared for part in first.parts if part.weight} == {
        "program": True, "plays": False, "Chess": True, "game": False, "human": False, "opponent": False,
    }  # fmt: skip


def test_words_of_an_unfiltered_vector_that_are_not_in_the_text(model: Any) -> None:
    passages = model.encode_texts(TEXTS[:1], is_query=False, content_filter=False, sparse_top_k=40)
    words = [word.text for word in Explainer(model, passages, texts=TEXTS[:1]).explain(QUESTION).matches[0].words]
    tokens = {model.tokenizer.decode([token]).strip() for token in passages.sparse_indices[0].tolist()}
    others = [word for word in words if word not in TEXTS[0].lower()]
    assert others
    assert set(others) <= tokens


def test_passages_without_sparse_vectors_are_refused(model: Any, passages: Any) -> None:
    with pytest.raises(ValueError, match="no sparse vectors"):
        Explainer(model, {"repr_hidden": passages.repr_hidden}).explain(QUESTION)


# ---------------------------------------------------------------------------------------------- the terminal


def test_a_file_is_asked(
    notes: Path, found: Explanation, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert run(notes, QUESTION, "listen to audio") == 0
    head, first, second, rest = capsys.readouterr().out.split("\n\n")
    assert head.startswith(f"{notes}: 3 passages; {SHIPPED}\n")
    match = found.matches[0]
    assert f"\n 1  {match.fused:.4f}  line 1\n" in first
    assert f"dense {match.dense:.4f}, sparse {match.sparse:.4f}: [chess {match.words[0].weight:.2f}], [" in first
    assert second.startswith("listen to audio\n    words: ")
    assert max(text_width(line) for line in first.splitlines()) <= 80
    assert rest == ""


def test_questions_are_read_where_none_is_given_and_long_passages_told(
    notes: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    notes.write_text("word " * 1000 + "\nshort\n")
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n\ntwo\n"))
    assert run(notes, "--top-k", 1) == 0
    printed = capsys.readouterr()
    assert re.findall("^(one|two)$", printed.out, re.M) == ["one", "two"]
    assert "tokens, and cut there: 1 of 2 passages" in printed.err


def test_a_store_is_asked_by_its_own_model_alone(
    model: Any, passages: Any, found: Explanation, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = describe_model(model, False, "float32", {"sparse_top_k": passages["sparse_indices"].shape[1]})
    write_store(tmp_path / "store", [ShardContents(list("abc"), **passages, texts=TEXTS)], settings.__dict__)
    assert run(tmp_path / "store", QUESTION) == 0
    match = found.matches[0]
    assert f"dense {match.dense:.4f}, sparse {match.sparse:.4f}: [chess" in capsys.readouterr().out
    assert run(tmp_path / "store", QUESTION, "--model", shipped_release(SHIPPED.replace("multi-q4-p4", "single"))) == 2
    assert "Encode both with one model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["missing.txt", "x"], "missing.txt: no such file"),
        (["notes.txt", " "], "a question is empty"),
        (["empty.jsonl", "x"], "empty.jsonl: no texts; expected at least one."),
        (["twice.jsonl", "x"], "twice.jsonl, line 2: the id 'a' is already that of twice.jsonl, line 1"),
        (["compressing", "x"], "compressing: not finished; run the same `diffretriever compress` command again"),
        (["encoding", "x"], "encoding/plan.json: the format is None"),
        (["notes.txt", "x", "--web"], "questions are asked on the page"),
        (["notes.txt", "x", "--port", "0"], "--port is the page's; give --web as well"),
        (["notes.txt", "x", "--fusion-weight", "2"], "must lie between 0 and 1"),
        (["notes.txt", "x", "--method", "repllama"], "repllama has no sparse vectors"),
    ],
)
def test_what_does_not_go(
    notes: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(notes.parent)
    Path("empty.jsonl").touch()
    Path("twice.jsonl").write_text('{"id": "a", "text": "x"}\n' * 2)
    for name, file in (("compressing", "codebook.safetensors"), ("encoding", "plan.json")):
        (notes.parent / name).mkdir()
        (notes.parent / name / file).write_text("{}")
    assert run(*arguments) == 2
    assert said in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- the page


@pytest.fixture(scope="module")
def server(explainer: Explainer) -> Iterator[PageServer]:
    with PageServer(explainer, "notes <1>", 0, top_k=10, weight=0.5) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def get(server: PageServer, path: str, host: str | None = None) -> tuple[int, str, dict[str, str]]:
    """Status, page and headers."""
    connection = HTTPConnection("127.0.0.1", server.port, timeout=20)
    connection.request("GET", path, headers={"Host": host or f"127.0.0.1:{server.port}"})
    answer = connection.getresponse()
    page = answer.read().decode()
    connection.close()
    return answer.status, page, dict(answer.headers)


def test_the_page_answers_and_nothing_in_it_is_markup(server: PageServer, found: Explanation) -> None:
    status, page, headers = get(server, f"/?q={quote('<script>alert(2)</script> checker')}&dense=0.25")
    assert status == 200
    assert "&lt;script&gt;alert(2)&lt;/script&gt; checker" in page
    assert 'value="0.25"' in page
    for raw in ("<script", "<b>", "<i>", "<1>"):
        assert raw not in page
    for escaped in ("&lt;i&gt;music&lt;/i&gt;", "notes &lt;1&gt;"):
        assert escaped in page
    assert "default-src 'none'" in headers["Content-Security-Policy"]  # a browser would run and fetch nothing anyway
    assert not re.search(r"(src|href)=\"(?!data:,)|@import|url\(", page)


def test_the_page_shows_what_the_explanation_has(found: Explanation) -> None:
    page = render_page("notes", 0.5, found)
    first = found.matches[0]
    assert f"fused {first.fused:.4f} · dense {first.dense:.4f} · sparse {first.sparse:.4f}" in page
    assert re.search(r'A <mark class="shared"[^>]*>program</mark> that <mark style[^>]*>plays</mark> ', page)
    cells = re.findall(r'<td class="( ?best)?[^"]*" style="--w: ([0-9.]+)">(-?[0-9.]+)</td>', page)
    maps = torch.tensor([float(value) for *_, value in cells]).view(len(found.matches), 4, 4)
    assert torch.allclose(maps, torch.stack([match.similarity for match in found.matches]), atol=6e-4)
    assert sum(bool(best) for best, *_ in cells) == 4 * len(found.matches)
    assert "Ask a question" in render_page("notes", 0.5, None)


def test_the_page_is_this_machines_alone(server: PageServer) -> None:
    assert server.server_address[0] == "127.0.0.1"
    assert get(server, "/?q=chess", host="evil.example")[0] == 403  # a name that was made to mean this machine
    assert get(server, "/", host=f"localhost:{server.port}")[0] == 200
    assert get(server, "/etc/passwd")[0] == 404
    assert get(server, "/?q=%20&dense=nan")[0] == 200


@pytest.mark.once
def test_a_browser_that_goes_away_leaves_no_trace(
    server: PageServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gone, ended = threading.Event(), threading.Event()
    shutdown = server.shutdown_request

    def late(*_: Any) -> str:
        gone.wait(10)
        return "x" * (1 << 24)  # more than a socket takes without a reader

    def end(request: Any) -> None:
        shutdown(request)
        ended.set()

    monkeypatch.setattr("diffretriever.cli.page.render_page", late)
    monkeypatch.setattr(server, "shutdown_request", end)
    connection = HTTPConnection("127.0.0.1", server.port, timeout=10)
    connection.request("GET", "/")
    connection.close()
    gone.set()
    assert ended.wait(10)
    assert capsys.readouterr().err == ""


def test_a_port_that_is_taken_is_told(server: PageServer, explainer: Explainer) -> None:
    with pytest.raises(ValueError, match=rf"--port {server.port}: 127\.0\.0\.1 .*give another"):
        serve(explainer, "notes", server.port, 10, 0.5)


def test_the_page_is_as_the_options_say_and_ends_by_ctrl_c(
    notes: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pages: list[str] = []

    def answer_one(self: PageServer) -> None:
        with ThreadPoolExecutor(1) as browser:
            page = browser.submit(get, self, "/?q=chess")
            self.handle_request()
            pages.append(page.result()[1])
        raise KeyboardInterrupt

    monkeypatch.setattr(PageServer, "serve_forever", answer_one)
    assert run(notes, "--web", "--port", 0, "--top-k", 2, "--fusion-weight", 0.7) == 0
    assert 'value="0.7"' in pages[0]
    assert pages[0].count(" · dense ") == 2
    assert re.match(r"http://127\.0\.0\.1:\d+ shows .*notes\.txt: 3 passages", capsys.readouterr().out)
