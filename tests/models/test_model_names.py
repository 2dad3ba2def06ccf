"""Names of models, short names, and which files of a repository they mean."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steermoe_local._util.files import human_size
from steermoe_local.errors import ModelError, UsageError
from steermoe_local.models.names import ModelName, choose, looks_like_name, repo_models, short_names
from tests.support.paths import ROOT

GB = 10**9


def pick(files: Any, text: str = "lab/m", file: str | None = None) -> tuple[str, ...]:
    """Paths that a name means; `files` are paths, or paths with their sizes."""
    sizes = files if isinstance(files, dict) else dict.fromkeys(files, GB)
    return choose(repo_models(sizes), ModelName.parse(text), file).paths


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lab/m", ModelName("lab/m")),
        ("lab/m:Q8_0", ModelName("lab/m", tag="Q8_0")),
        ("lab/m:UD-Q4_K_XL", ModelName("lab/m", tag="UD-Q4_K_XL")),
        ("lab/m@v1.0", ModelName("lab/m", "v1.0")),
        ("lab/m@refs/pr/3:iq4_xs", ModelName("lab/m", "refs/pr/3", "iq4_xs")),
        ("gpt-oss-20b", ModelName("ggml-org/gpt-oss-20b-GGUF")),
        ("GPT-OSS-20B:MXFP4", ModelName("ggml-org/gpt-oss-20b-GGUF", tag="MXFP4")),
    ],
)
def test_parse(text: str, expected: ModelName) -> None:
    assert ModelName.parse(text) == expected
    assert ModelName.parse(str(expected)) == expected


def test_revision_of_a_flag() -> None:
    assert ModelName.parse("lab/m:Q8_0", "v2") == ModelName("lab/m", "v2", "Q8_0")
    assert ModelName.parse("lab/m@v2", "v2").revision == "v2"
    assert ModelName.parse("gpt-oss-20b", "v2").revision == "v2"
    with pytest.raises(UsageError, match=r"revision v1, and --revision is v2"):
        ModelName.parse("lab/m@v1", "v2")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "lab",
        "lab/",
        "/m",
        "lab/m/n",
        "lab/m:",
        "lab/m@",
        "lab/m:a b",
        "../m",
        "lab/..",
        "lab/m@..",
        "lab/m@a/../../b",
        "lab/m@/etc",
        "lab/m@a\\b",
        "lab\\m",
        "lab/m\n",
        "lab/m@\x1b[2J",
        "no-such-short-name",
        "https://lab/m",
        "lab/\u043c",
    ],
)
def test_what_is_no_name(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        ModelName.parse(text)
    assert "\n" not in str(caught.value).removeprefix(text)
    assert "short-names" in str(caught.value)


@given(st.text(alphabet="ab/.:@-_\\ \n~", max_size=12))
def test_a_name_never_leaves_its_folder(text: str) -> None:
    try:
        name = ModelName.parse(text)
    except UsageError:
        return
    assert ModelName.parse(str(name)) == name
    for part in (*name.repo.split("/"), *name.revision.split("/")):
        assert part not in ("", ".", "..")
        assert not set(part) & set("/\\\n")


def test_names_and_paths_are_told_apart() -> None:
    for name in ("lab/m", "lab/m:Q4_K_M", "gpt-oss-20b", "gpt-oss-20b:Q8_0", "Mixtral-8x7B"):
        assert looks_like_name(name), name
    for path in ("lab/m.gguf", "./lab/m", "/lab/m", "m.GGUF", "a/b/c", "C:\\m", "~/m", "m", "tiny"):
        assert not looks_like_name(path), path


#
# short names
#


def test_the_table_of_short_names() -> None:
    """Every family that people run; every entry is a name that can be fetched."""
    table = short_names()
    for family in (
        "olmoe-1b-7b",
        "olmoe-1b-7b-0924",
        "granite-1b-a400m",
        "granite-3b-a800m",
        "qwen3-30b-a3b",
        "qwen3-30b-a3b-2507",
        "qwen3-30b-a3b-thinking",
        "qwen3-coder-30b-a3b",
        "gpt-oss-20b",
        "gpt-oss-120b",
        "phi-3.5-moe",
        "mixtral-8x7b",
        "lfm2-8b-a1b",
        "qwen1.5-moe-a2.7b",
        "deepseek-v2-lite",
        "ernie-4.5-21b-a3b",
    ):
        assert family in table
    for short, target in table.items():
        assert ModelName.parse(short) == ModelName.parse(target)
        assert "gguf" in target.lower()
        # the name says which model it is: its words are words of the repository
        words = [word for word in re.split(r"[-.]", short) if not word.isdigit()]
        assert all(word in target.lower() for word in words if word not in ("granite", "moe")), (short, target)


def test_the_table_is_a_file_to_read() -> None:
    text = (ROOT / "steermoe_local" / "models" / "short_names.toml").read_text("utf-8")
    assert text.startswith("#")
    assert "looked up in public sources, not downloaded" in text
    assert list(short_names()) == re.findall(r'^"([^"]+)" = ', text, re.MULTILINE)
    assert not re.search(r"https?:|\.(co|com|org)\b", text), "no hosts in files"


#
# files of a repository
#


def test_a_tag_is_matched_as_by_llama_cpp() -> None:
    files = ["M-Q2_K.gguf", "M-Q4_K_M.gguf", "M-Q4_K_S.gguf", "M-Q8_0.gguf", "README.md", "mmproj-M-Q4_K_M.gguf"]
    assert pick(files) == ("M-Q4_K_M.gguf",)
    assert pick(files, "lab/m:q8_0") == ("M-Q8_0.gguf",)
    assert pick(files, "lab/m:Q4_K_S") == ("M-Q4_K_S.gguf",)
    with pytest.raises(ModelError, match=r"quantization Q4_K; it has Q2_K \(1\.0 GB\), Q4_K_M .*Q8_0") as caught:
        pick(files, "lab/m:Q4_K")
    assert "mmproj" not in str(caught.value)


@pytest.mark.parametrize(
    ("files", "tag", "expected"),
    [
        (["olmoe-q4_k_m.gguf", "olmoe-q8_0.gguf"], "Q4_K_M", "olmoe-q4_k_m.gguf"),
        (["M.Q4_K_M.gguf", "M.f16.gguf"], "F16", "M.f16.gguf"),
        (["M.i1-Q4_K_M.gguf", "M.i1-IQ1_S.gguf"], "iq1_s", "M.i1-IQ1_S.gguf"),
        (["M-UD-Q4_K_XL.gguf", "M-Q4_K_M.gguf"], "UD-Q4_K_XL", "M-UD-Q4_K_XL.gguf"),
        (["M-UD-Q4_K_XL.gguf", "M-Q4_K_M.gguf"], "Q4_K_XL", "M-UD-Q4_K_XL.gguf"),
        (["M-UD-Q4_K_M.gguf", "M-Q4_K_M.gguf"], "Q4_K_M", "M-Q4_K_M.gguf"),
        (["gpt-oss-20b-mxfp4.gguf", "gpt-oss-20b-F16.gguf"], "MXFP4", "gpt-oss-20b-mxfp4.gguf"),
        (["Q4_K_M/model.gguf", "Q8_0/model.gguf"], "Q8_0", "Q8_0/model.gguf"),
        (["a.b/M-BF16.gguf", "M-Q4_0.gguf"], "bf16", "a.b/M-BF16.gguf"),
        (["base-model.gguf", "chat-model.gguf"], "chat-model", "chat-model.gguf"),
    ],
)
def test_spellings_of_tags(files: list[str], tag: str, expected: str) -> None:
    assert pick(files, f"lab/m:{tag}") == (expected,)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["M-Q8_0.gguf", "M-Q2_K.gguf"], "M-Q8_0.gguf"),
        (["M-IQ1_S.gguf"], "M-IQ1_S.gguf"),
        (["gpt-oss-20b-mxfp4.gguf", "gpt-oss-20b-F16.gguf"], "gpt-oss-20b-mxfp4.gguf"),
        (["M-BF16.gguf", "M-Q2_K.gguf", "M-Q4_K_S.gguf", "M-Q6_K.gguf"], "M-Q4_K_S.gguf"),
    ],
)
def test_the_usual_choice(files: list[str], expected: str) -> None:
    assert pick(files) == (expected,)


def test_no_usual_choice() -> None:
    with pytest.raises(ModelError, match=r"REPO:QUANT; it has BF16 .*, Q2_K \(1\.0 GB\)"):
        pick(["M-BF16.gguf", "M-Q2_K.gguf"])


def test_several_fit() -> None:
    files = {"base-Q4_K_M.gguf": 2 * GB, "chat-Q4_K_M.gguf": 3 * GB}
    words = r"several files fit{}: base-Q4_K_M\.gguf \(2\.0 GB\), chat-Q4_K_M\.gguf \(3\.0 GB\); name one with --file"
    with pytest.raises(ModelError, match=words.format("")):
        pick(files)
    with pytest.raises(ModelError, match=words.format(" q4_k_m")):
        pick(files, "lab/m:q4_k_m")
    assert pick(files, file="chat-Q4_K_M.gguf") == ("chat-Q4_K_M.gguf",)
    assert pick(files, "lab/m:Q8_0", file="chat-Q4_K_M.gguf") == ("chat-Q4_K_M.gguf",), "the file counts"
    with pytest.raises(ModelError, match=r"file x\.gguf; it has base-Q4_K_M\.gguf \(2\.0 GB\)"):
        pick(files, file="x.gguf")


def test_split_models() -> None:
    parts = [f"Q8_0/M-Q8_0-{n:05d}-of-00003.gguf" for n in (3, 1, 2)]
    files = [*parts, "M-Q4_K_M-00001-of-00002.gguf", "M-Q4_K_M-00002-of-00002.gguf", "M-Q2_K.gguf"]
    assert pick(files, "lab/m:Q8_0") == tuple(sorted(parts))
    assert pick(files) == ("M-Q4_K_M-00001-of-00002.gguf", "M-Q4_K_M-00002-of-00002.gguf")
    assert pick(files, file=parts[0]) == tuple(sorted(parts)), "any part stands for the set"
    assert [model.size for model in repo_models(dict.fromkeys(files, 5))] == [5, 10, 15]
    for n in range(3):
        some = [path for i, path in enumerate(sorted(parts)) if i != n]
        with pytest.raises(ModelError, match=f"part {n + 1} of 3 is not there"):
            pick(some)


def test_files_that_are_no_models() -> None:
    others = [
        "mmproj-F16.gguf",
        "M.mmproj-Q8_0.gguf",
        "M-imatrix.gguf",
        "mtp-M-Q4_0.gguf",
        "eagle3-M-Q4_0.gguf",
        "dflash-M-Q4_0.gguf",
        "dspark-M-Q4_0.gguf",
        "ggml-vocab-llama.gguf",
        "M-vocab.gguf",
        "config.json",
        "M.safetensors",
        "M.gguf.part1of2",
        "../M-Q4_K_M.gguf",
        "/etc/M-Q4_K_M.gguf",
        "a//M-Q4_K_M.gguf",
        "a\\M-Q4_K_M.gguf",
        "M\x1b[2J-Q4_K_M.gguf",
    ]
    assert repo_models(dict.fromkeys(others, 1)) == []
    with pytest.raises(ModelError, match=r"no GGUF models"):
        pick(others)
    assert pick([*others, "Vocabulist-Q8_0.gguf"]) == ("Vocabulist-Q8_0.gguf",)


def test_parts_with_impossible_numbers() -> None:
    assert pick(["M-Q8_0-00000-of-00000.gguf"]) == ("M-Q8_0-00000-of-00000.gguf",)
    assert pick(["M-Q8_0-00001-of-00001.gguf"]) == ("M-Q8_0-00001-of-00001.gguf",)
    assert len(repo_models({"M-00004-of-00002.gguf": 1, "M-00001-of-00002.gguf": 1})) == 2


PATHS = st.lists(
    st.builds(
        lambda folder, name, quant, part: f"{folder}{name}-{quant}{part}.gguf",
        st.sampled_from(["", "a/", "Q8_0/"]),
        st.sampled_from(["M", "mmproj-M", "N.x"]),
        st.sampled_from(["Q4_K_M", "q8_0", "UD-Q2_K", "BF16", "x"]),
        st.sampled_from(["", "-00001-of-00002", "-00002-of-00002"]),
    ),
    unique=True,
)


@given(PATHS, st.sampled_from(["", ":Q4_K_M", ":q8_0", ":BF16", ":nothing"]))
def test_a_choice_is_one_whole_model(paths: list[str], tag: str) -> None:
    models = repo_models(dict.fromkeys(paths, 7))
    listed = [path for model in models for path in model.paths]
    assert sorted(listed) == sorted(path for path in paths if "mmproj" not in path)
    try:
        found = choose(models, ModelName.parse("lab/m" + tag))
    except ModelError:
        return
    assert found in models
    assert not found.missing
    assert tag[1:].lower() in found.paths[0].lower()


def test_sizes_in_words() -> None:
    assert [human_size(n) for n in (0, 10_015_328, 999_949_999, GB, 18_556_685_824)] == [
        "0.0 MB",
        "10.0 MB",
        "999.9 MB",
        "1.0 GB",
        "18.6 GB",
    ]


def test_paths_longer_than_systems_have_them_are_left_out() -> None:
    name = "x" * 1019 + ".gguf"
    assert [model.paths for model in repo_models({name: 9, f"x{name}": 9})] == [(name,)]
