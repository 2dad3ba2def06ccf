"""`steermoe pairs`: files made from data, and what `check` says of targets under a model's own template."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from gguf import GGUFReader, GGUFWriter

from steermoe_local.cli import main
from steermoe_local.detection.pair_check import Checker
from steermoe_local.errors import ModelError, UsageError
from steermoe_local.llama import capi
from steermoe_local.llama.rendering import Renderer, vocabulary
from steermoe_local.models.embedded import behaviours
from steermoe_local.pairs.builders import REFUSALS
from steermoe_local.pairs.pairs import Message, Pair, load_pairs, save_pairs
from tests.pairs.test_pair_builders import COLUMNS, RATED, SQUAD, write_lines, write_parquet
from tests.support.paths import ROOT

EXAMPLES = ROOT / "examples" / "pairs"
USER = "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
# In the manner of Qwen3: a block for thoughts before the last reply, closed at once when thinking is off.
SWITCH = (
    "{%- if enable_thinking is not defined %}{%- set enable_thinking = true %}{%- endif %}"
    "{% for m in messages %}[{{ m.role }}]{% if loop.last and not enable_thinking %}(no thoughts) {% endif %}"
    "{{ m.content }}\n{% endfor %}"
)


def run(*args: Any, **kwargs: Any) -> Result:
    return CliRunner().invoke(main, ["pairs", *map(str, args)], **kwargs)


def ok(*args: Any, **kwargs: Any) -> Result:
    result = run(*args, **kwargs)
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory, tiny_path: Path) -> Any:
    """Vocabulary files: the embedded model's tokenizer under another chat template (None: without one)."""
    folder = tmp_path_factory.mktemp("templates")

    def make(name: str, template: str | None) -> Path:
        path = folder / f"{name}.gguf"
        writer = GGUFWriter(path, "olmoe")
        for key, field in GGUFReader(tiny_path).fields.items():
            if key.startswith(("GGUF.", "general.architecture")) or key == "tokenizer.chat_template":
                continue
            kind = field.types[0]
            writer.add_key_value(key, field.contents(), kind, field.types[-1] if len(field.types) > 1 else None)
        if template is not None:
            writer.add_chat_template(template)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        return path

    return make


def chat(reply: str) -> tuple[Message, ...]:
    return (Message("user", "Count to three."), Message("assistant", reply))


@pytest.fixture
def one(tmp_path: Path) -> Path:
    path = tmp_path / "one.jsonl"
    save_pairs([Pair("a", chat("1, 2, 3"), chat("one, two, three"), "1, 2, 3", "one, two, three")], path)
    return path


#
# making
#


def test_faithfulness(tmp_path: Path) -> None:
    document, out = tmp_path / "squad.json", tmp_path / "out.jsonl"
    document.write_text(json.dumps(SQUAD))
    result = ok("faithfulness", "--squad", document, "-o", out)
    assert result.stdout == ""
    assert "2 pairs from 3 rows" in result.stderr
    assert "1 left out: the document" in result.stderr
    assert [pair.id for pair in load_pairs(out)] == ["q1", "q3"]
    data = json.loads(ok("faithfulness", "--squad", document, "-o", out, "--keep-impossible", "--json").stdout)
    assert data["pairs"] == data["rows"] == 3
    assert data["skipped"] == {}
    ok("faithfulness", "--squad", document, "-o", out, "--skip", 1, "--limit", 1)
    assert [pair.id for pair in load_pairs(out)] == ["q3"]
    ok("faithfulness", "--squad", document, "-o", out, "--sample", 1, "--seed", 2, "--one-per-document")
    assert len(load_pairs(out)) == 1


def test_faithfulness_of_parquet(tmp_path: Path) -> None:
    path, out = write_parquet(tmp_path / "t.parquet", COLUMNS), tmp_path / "out.jsonl"
    ok("faithfulness", "--squad", path, "-o", out)
    assert [pair.id for pair in load_pairs(out)] == ["q1", "q3"]


def test_safety(tmp_path: Path) -> None:
    data, out, own = write_lines(tmp_path / "rated.jsonl", RATED), tmp_path / "out.jsonl", tmp_path / "refusals.txt"
    ok("safety", "--data", data, "-o", out)
    first = out.read_bytes()
    assert {pair.positive_target for pair in load_pairs(out)} <= set(REFUSALS)
    ok("safety", "--data", data, "-o", out)
    assert out.read_bytes() == first
    seeds = set()
    for seed in range(8):
        ok("safety", "--data", data, "-o", out, "--seed", seed)
        seeds.add(out.read_bytes())
    assert len(seeds) > 4
    own.write_text("No, thanks.\n\nNever.\n")
    ok("safety", "--data", data, "-o", out, "--refusals", own, "--one-per-prompt")
    assert {pair.positive_target for pair in load_pairs(out)} <= {"No, thanks.", "Never."}
    assert len(load_pairs(out)) == 2


def test_numbers_are_the_same_for_a_seed(tmp_path: Path) -> None:
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    for path, seed in ((a, 1), (b, 1)):
        ok("numbers", "-n", 30, "--seed", seed, "-o", path)
    assert a.read_bytes() == b.read_bytes()
    assert len(load_pairs(a)) == 30
    ok("numbers", "-n", 30, "--seed", 2, "-o", b)
    assert a.read_bytes() != b.read_bytes()
    result = run("numbers", "-n", 5000, "--largest", 10, "-o", b)
    assert result.exit_code == 2
    assert "raise --largest" in result.stderr


def test_from_csv(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    columns = ["--positive-column", "polite", "--negative-column", "curt"]
    ok("from-csv", EXAMPLES / "tone.csv", "--prompt-column", "question", *columns, "-o", out, "--limit", 2)
    pairs = load_pairs(out)
    assert [pair.negative_target for pair in pairs] == ["End of this street.", "Half past four."]
    assert pairs[0].positive[0] == Message("user", "Where is the station?")
    tabs = tmp_path / "tabs.tsv"
    tabs.write_text("polite\tcurt\nyes, please\tyes\n")
    ok("from-csv", tabs, *columns, "--delimiter", "\\t", "-o", out)
    assert load_pairs(out)[0].positive == "yes, please"
    assert run("from-csv", tabs, *columns, "--delimiter", ",", "-o", out).exit_code == 1
    result = run("from-csv", tabs, *columns, "--delimiter", ";;", "-o", out)
    assert result.exit_code == 2
    assert "';;'" in result.stderr


def test_controls(tmp_path: Path) -> None:
    source, out = tmp_path / "n.jsonl", tmp_path / "out.jsonl"
    ok("numbers", "-n", 40, "-o", source)
    before = {pair.id: pair for pair in load_pairs(source)}
    result = ok("shuffle", source, "-o", out, "--seed", 3)
    assert "40 pairs from 40 rows" in result.stderr
    swapped = [pair for pair in load_pairs(out) if pair.id.endswith("~swapped")]
    assert len(swapped) == 20
    assert all(before[pair.id.removesuffix("~swapped")].positive == pair.negative for pair in swapped)
    ok("shuffle", out, "-o", out, "--seed", 4)  # of a shuffled file, in place
    assert len(load_pairs(out)) == 40
    ok("superficial", source, "-o", out, "--kind", "length")
    assert {pair.id.split("~")[1] for pair in load_pairs(out)} == {"length"}
    ok("superficial", source, "-o", out)
    ok("check", out, "-m", "tiny")


def test_a_swap_whose_name_is_taken(tmp_path: Path) -> None:
    source, out = tmp_path / "s.jsonl", tmp_path / "out.jsonl"
    save_pairs([Pair(name, f"{name}+", f"{name}-", "+", "-") for name in ("a", "a~swapped")], source)
    for seed in range(6):
        ok("shuffle", source, "-o", out, "--seed", seed)
        assert len(load_pairs(out)) == 2


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["faithfulness", "--squad", "none.json"], 1, "none.json"),
        (["faithfulness", "--squad", "bad.json"], 1, "SQuAD"),
        (["faithfulness", "--squad", "bad.json", "--limit", "1", "--sample", "1"], 2, "--limit"),
        (["faithfulness", "--squad", "bad.json", "--skip", "-1"], 2, "--skip"),
        (["faithfulness", "--squad", "hub:a b"], 2, "hub:a b: "),
        (["safety", "--data", "bad.json"], 1, "no prompt, response, is_safe"),
        (["safety", "--data", "safe.json"], 1, "no pair"),
        (["safety", "--data", "safe.json", "--refusals", "empty.txt"], 1, "empty.txt: "),
        (["from-csv", "bad.json", "--positive-column", "a", "--negative-column", "b"], 1, "no column 'a', 'b'"),
        (["numbers", "--largest", "3"], 2, "--largest"),
        (["superficial", "none.jsonl"], 1, "none.jsonl"),
        (["superficial", "safe.json"], 1, "safe.json: not a pairs file: this is data in BeaverTails' layout"),
        (["shuffle", "bad.json"], 1, "bad.json:1"),
    ],
)
def test_errors_leave_no_file(
    arguments: list[str], status: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.json").write_text('{"x": 1}')
    Path("safe.json").write_text(json.dumps(RATED[2]))
    Path("empty.txt").write_text("")
    files = set(tmp_path.iterdir())
    result = run(*arguments, "-o", "out.jsonl")
    assert result.exit_code == status, result.output
    assert words in result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.output
    assert set(tmp_path.iterdir()) == files


def test_the_output_is_tried_first(tmp_path: Path) -> None:
    columns = ["--positive-column", "a", "--negative-column", "b"]
    for arguments in (
        ["numbers"],
        ["faithfulness", "--squad", "hub:nobody/asks"],
        ["safety", "--data", "hub:nobody/asks"],
        ["from-csv", "hub:nobody/asks", *columns],
        ["superficial", "none"],
        ["shuffle", "none"],
    ):
        result = run(*arguments, "-o", tmp_path / "no" / "folder.jsonl")
        assert (result.exit_code, str(tmp_path / "no") in result.stderr) == (2, True), arguments


#
# checking
#


def check(path: Path, model: Any, *flags: Any) -> dict[str, Any]:
    result = run("check", path, "-m", model, "--json", *flags)
    assert result.exit_code in (0, 1), result.output
    data: dict[str, Any] = json.loads(result.stdout)
    assert bool(data["problems"]) == (result.exit_code == 1)
    return data


def test_check_counts_as_the_recorder(tiny_model: Any) -> None:
    renderer = Renderer(tiny_model)
    for behaviour in behaviours():
        data = check(behaviour.pairs, "tiny")
        pairs = load_pairs(behaviour.pairs)
        assert data["located"] == data["pairs"] == len(pairs)
        for name, side in (("positive", 0), ("negative", 1)):
            prompts = [renderer.prompt(*pair.sides()[side]) for pair in pairs]
            figures = data["sides"][name]
            assert figures["target_tokens"]["total"] == sum(len(prompt.target) for prompt in prompts)
            assert figures["prompt_tokens"]["longest"] == max(len(prompt.tokens) for prompt in prompts)
            assert figures["prompt_tokens"]["shortest"] == min(len(prompt.tokens) for prompt in prompts)


def test_check_of_the_examples() -> None:
    for path in EXAMPLES.glob("*.jsonl"):
        assert check(path, "tiny")["problems"] == [], path


def test_check_shows_the_target(one: Path) -> None:
    text = ok("check", one, "-m", "tiny").stdout
    assert "«1, 2, 3»" in text
    assert "«one, two, three»" in text
    assert "pairs" in text
    assert "located 1" in text
    assert "«" not in ok("check", one, "-m", "tiny", "--limit", 0).stdout


def test_check_in_colour(one: Path) -> None:
    result = ok("check", one, "-m", "tiny", env={"FORCE_COLOR": "1", "TERM": "xterm-256color"})
    assert "\x1b[1;32m1, 2, 3\x1b[0m" in result.stdout
    assert "\x1b[1;31mone, two, three\x1b[0m" in result.stdout
    plain = ok("check", one, "-m", "tiny", env={"FORCE_COLOR": "1", "TERM": "xterm-256color", "NO_COLOR": "1"}).stdout
    assert "\x1b[32m" not in plain
    assert "«1, 2, 3»" in plain


def test_control_characters_do_not_reach_the_terminal(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    evil = "a\x1b]0;title\x07b\x9b2J"
    save_pairs([Pair("id\x1b[2J", chat(evil), chat("x"), evil, "x")], path)
    for flags in ([], ["--full"]):
        out = run("check", path, "-m", "tiny", *flags).output
        assert not {"\x1b", "\x07", "\x9b"} & set(out)


def test_long_prompts_are_cut_unless_full(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    long = "start " + "word " * 200
    save_pairs([Pair("a", long + "yes", long + "no", "yes", "no")], path)
    short, full = (ok("check", path, "-m", "tiny", *flags).stdout for flags in ([], ["--full"]))
    assert "start" not in short
    assert "…" in short
    assert "start" in full
    assert len(full) > 1500 > len(short)


def test_all_that_cannot_be_located_is_listed(tmp_path: Path, templates: Any) -> None:
    """A template that changes texts, lines that are no pairs, and pairs that are fine."""
    model = templates("no-x", USER.replace("m.content", "m.content | replace('x', 'y')"))
    path = tmp_path / "p.jsonl"
    pairs = [Pair("fine", chat("abc"), chat("def"), "abc", "def"), Pair("bad", chat("axb"), chat("b"), "axb", "b")]
    save_pairs(pairs, path)
    lines = path.read_text()
    lines += '{"broken": \n\n{"id": "gone", "positive": "a", "negative": "b", "positive_target": "a", '
    lines += '"negative_target": "z"}\n' + lines.splitlines()[0] + "\n3\n"
    path.write_bytes(b"\xef\xbb\xbf" + lines.encode() + b'{"id": "\xff"}\n')
    data = check(path, model)
    assert (data["pairs"], data["located"]) == (7, 1)
    found = [(p["id"], p["side"], p["reason"].split(";")[0]) for p in data["problems"]]
    assert found[0][:2] == ("bad", "positive")
    assert "target 'axb' of message 2 (assistant) is not rendered" in found[0][2]
    assert found[1][0] == "line-3"
    assert "not JSON" in found[1][2]
    assert found[2] == ("gone (line-5)", "negative", "negative_target: 'z' does not occur in negative")
    assert found[3] == ("fine (line-6)", "", "id: 'fine' is already the id of line 1")
    assert "not a JSON object" in found[4][2]
    assert "not UTF-8" in found[5][2]
    result = run("check", path, "-m", model)
    assert result.exit_code == 1
    for name, side, reason in found:
        assert result.stdout.count(f"{name}{', ' if side else ''}{side}: {reason}") == 1
        assert result.stdout.count(reason) == 1, "each problem is said once"
    assert "Traceback" not in result.output


def test_a_model_without_a_template(tmp_path: Path, one: Path, templates: Any) -> None:
    model = templates("none", None)
    data = check(one, model)
    assert [p["side"] for p in data["problems"]] == ["positive", "negative"]
    assert "no chat template" in data["problems"][0]["reason"]
    plain = tmp_path / "plain.jsonl"
    save_pairs([Pair("a", "one two", "1 2", "two", "2")], plain)
    assert check(plain, model)["problems"] == []


def test_a_template_that_refuses_or_is_broken(one: Path, templates: Any) -> None:
    for name, template, words in (
        ("refuses", "{{ raise_exception('only one message') }}", "only one message"),
        ("broken", "{% if %}", "cannot be read"),
        ("attacks", "{{ messages.__class__.__mro__ }}", "refuses these messages"),
    ):
        reasons = [p["reason"] for p in check(one, templates(name, template))["problems"]]
        assert len(reasons) == 2
        assert all(words in reason for reason in reasons), reasons


def test_warnings(tmp_path: Path, one: Path, tiny_path: Path) -> None:
    assert check(one, "tiny")["warnings"] == []
    data = check(one, "tiny", "-c", 11)
    assert data["context"] == 11
    assert {w["side"] for w in data["warnings"]} == {"positive", "negative"}
    assert "context of 11" in data["warnings"][0]["reason"]
    assert check(one, "tiny")["context"] == int(GGUFReader(tiny_path).fields["olmoe.context_length"].contents())
    same = tmp_path / "same.jsonl"
    save_pairs([Pair("s", chat("1, 2"), chat("1, 2"), "1, 2", "1, 2")], same)
    assert "both sides render" in check(same, "tiny")["warnings"][0]["reason"]
    assert run("check", same, "-m", "tiny").exit_code == 0


def test_the_rule_of_the_paper_finds_another_place(tmp_path: Path, templates: Any) -> None:
    path = tmp_path / "p.jsonl"
    save_pairs([Pair("a", chat("stop there"), chat("go"), "stop", "go")], path)
    assert check(path, templates("plain", USER))["warnings"] == []
    # the target's tokens come once more behind it, in the template's own text: that rule takes those
    warnings = check(path, templates("echo", USER + "stop"))["warnings"]
    assert [(w["id"], w["side"]) for w in warnings] == [("a", "positive")]
    assert "the paper's rule" in warnings[0]["reason"]


def test_what_is_not_a_model_or_not_pairs(one: Path, tmp_path: Path) -> None:
    for arguments, words in (
        ([one, "-m", tmp_path / "none.gguf"], "none.gguf: "),
        ([one, "-m", one], f"{one}: not a GGUF file"),
        ([tmp_path / "none.jsonl", "-m", "tiny"], "none.jsonl: "),
        ([tmp_path, "-m", "tiny"], f"{tmp_path}: "),
    ):
        result = run("check", *arguments)
        assert result.exit_code == 1, arguments
        assert words in result.stderr
        assert result.stderr.count("\n") == 1
        assert result.stdout == ""
    (tmp_path / "empty").write_text("\n")
    result = run("check", tmp_path / "empty", "-m", "tiny")
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert f"{tmp_path / 'empty'}: no pairs" in result.stderr


def test_only_the_vocabulary_is_loaded(tiny_path: Path, templates: Any) -> None:
    """A file without a single tensor is enough."""
    with vocabulary(templates("bare", USER)) as model:
        assert model.n_vocab() > 100
        assert capi.llama_cpp().llama_model_n_params(model.model) == 0
    with pytest.raises(ModelError, match="none: "), vocabulary(tiny_path / "none"):
        pass


def test_the_commands_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(EXAMPLES, tmp_path / "examples" / "pairs")
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "pairs.md").read_text("utf-8")
    blocks = re.findall(r"(<!-- not run: [^\n]*-->\n)?^```sh\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    lines = [line for skipped, block in blocks if not skipped for line in block.replace("\\\n", "").splitlines()]
    assert len(lines) == 7
    for line in lines:
        program, group, *arguments = shlex.split(line)
        assert (program, group) == ("steermoe", "pairs")
        ok(*arguments)


#
# thinking
#


def test_thinking_is_off_unless_asked_for(one: Path, templates: Any) -> None:
    model = templates("switch", SWITCH)
    off, on = check(one, model), check(one, model, "--thinking")
    assert off["template_arguments"] == {"enable_thinking": False}
    assert on["template_arguments"] == {"enable_thinking": True}
    with vocabulary(model) as opened:
        assert Renderer(opened).template_arguments == {"enable_thinking": False}, "recording has it off as well"
    assert off["located"] == on["located"] == 1
    longer = [d["sides"]["positive"]["prompt_tokens"]["total"] for d in (off, on)]
    assert longer[0] > longer[1]
    assert "(no thoughts) «1, 2, 3»" in ok("check", one, "-m", model).stdout
    assert "(no thoughts)" not in ok("check", one, "-m", model, "--thinking").stdout
    assert "enable_thinking=false" in ok("check", one, "-m", model).stdout
    assert "no switch" in ok("check", one, "-m", "tiny").stdout


def test_further_variables(one: Path, templates: Any) -> None:
    model = templates("vars", "{{ style }}{{ reasoning_effort }}" + SWITCH)
    flags = ["--chat-template-kwargs", '{"style": "brief ", "enable_thinking": true}']
    data = check(one, model, *flags)
    assert data["template_arguments"] == {"enable_thinking": True, "reasoning_effort": "low", "style": "brief "}
    assert "brief low[user]" in ok("check", one, "-m", model, "--full", *flags).stdout
    for value in ("3", "{", '{"a": 1, "a": 2}'):
        assert run("check", one, "-m", model, "--chat-template-kwargs", value).exit_code == 2
    result = run("check", one, "-m", model, "--chat-template-kwargs", '{"messages": []}')
    assert result.exit_code == 2
    assert "messages: " in result.stderr


def test_the_checker_is_a_library_too(one: Path, tiny_path: Path) -> None:
    with Checker(tiny_path) as checker:
        (pair,) = [checker.check(pair) for pair in load_pairs(one)]
    assert [side.parts[1] for side in pair.sides] == ["1, 2, 3", "one, two, three"]
    assert list(pair.problems()) == list(pair.warnings()) == []
    with pytest.raises(UsageError, match="tools: "):
        Checker(tiny_path, template_arguments={"tools": []})


def test_check_of_a_file_with_a_problem_in_each_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "words.jsonl"
    path.write_text("word\n" * 100_000)
    done = CliRunner().invoke(main, ["pairs", "check", str(path), "-m", "tiny", "--json"])
    assert done.exit_code == 1
    problems = json.loads(done.stdout)["problems"]
    assert len(problems) == 10_002
    assert "checked no further" in problems[-1]["reason"]
