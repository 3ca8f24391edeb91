"""What the commands share: safe text, JSON, figures, and how a cache is found."""

import io
import json
import os
import re
import subprocess
import sys

import click
import diskcache
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

import cachepipe
from cachepipe import terminal
from cachepipe.cli import common, group
from cachepipe.cli.group import COMMANDS, cli
from cachepipe.errors import StoreError

HOSTILE = "\x1b]0;title\x07\x1b[31mred\x9b2J\x7f\r\u202egnp.exe\u2028\ufeff\ud800\U000e0041"


def test_what_a_terminal_would_obey_is_written_out():
    shown = terminal.visible(HOSTILE)
    assert shown.startswith(r"\x1b]0;title\x07\x1b[31mred\x9b2J\x7f\r\u202egnp.exe\u2028")
    assert shown.isprintable()


def test_line_feeds_and_tabs_stay_only_where_lines_are_wanted():
    assert terminal.visible("a\tb\nc\r\n", lines=True) == "a\tb\nc\\r\n"
    assert terminal.visible("a\tb\nc") == r"a\tb\nc"


def test_text_of_any_language_stays_as_it_is():
    for text in ("plain", "日本語", "नमस्ते", "👩‍🚀", "می‌خواهم", "é"):
        assert terminal.visible(text) == text


@given(st.text(st.characters(categories=["Cc", "Cs", "Zl", "Zp", "L", "P"])))
def test_no_control_or_surrogate_is_ever_left(text):
    assert terminal.visible(text).isprintable()
    terminal.visible(text).encode()


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.text(st.characters(categories=["Cc", "Cf", "Zl", "L"])),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_json_is_equal_when_parsed_and_holds_nothing_to_obey(value):
    text = common.json_text(value)
    assert json.loads(text) == value
    assert "\n" not in text
    assert not common.UNSAFE.search(text)


def test_json_of_a_hostile_text_is_printable():
    assert common.json_text({"a": HOSTILE}).isprintable()


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_json_stays_json_where_the_output_has_no_unicode(encoding, monkeypatch):
    value = {"Grüße": ["日本語", "👩‍🚀", HOSTILE.encode("utf-8", "replace").decode()]}
    output = io.TextIOWrapper(io.BytesIO(), encoding, errors="backslashreplace")
    monkeypatch.setattr(sys, "stdout", output)
    common.echo_lines([common.json_text(value)])
    assert json.loads(output.buffer.getvalue().decode(encoding)) == value


def test_the_beginning_of_a_text_is_one_line_of_at_most_so_many_columns():
    assert common.beginning("  first\n\n  second\tthird ", 40) == "first second third"
    assert common.beginning("x" * 100, 10) == "x" * 9 + "…"
    cut = common.beginning("日本語" * 20, 10)
    assert common.width_of(cut) <= 10
    assert cut.endswith("…")
    assert common.beginning("\x1b" * 100, 10) == r"\x1b\x1b\…"


@pytest.mark.parametrize(
    ("part", "whole", "text"),
    [
        (0, 0, "-"),
        (0, 5, "0%"),
        (5, 5, "100%"),
        (1, 3, "33.3%"),
        (99_999, 100_000, "99.9%"),
        (1, 10**6, "<0.1%"),
    ],
)
def test_a_share_is_never_rounded_to_all_or_nothing(part, whole, text):
    assert common.share(part, whole) == text


def test_sizes_are_said_as_people_say_them():
    assert [common.size(count) for count in (0, 812, 3_400_000, 999_000_000_000_000)] == [
        "0 B",
        "812 B",
        "3.4 MB",
        "999.0 TB",
    ]


def test_a_time_beyond_the_calendar_is_shown_all_the_same():
    assert common.when(1e300) == "1e+300"


def test_a_table_in_a_pipe_is_aligned_and_its_numbers_are_bare(capsys):
    rows = [{"name": "日本", "count": 1234567}, {"name": "a\nb", "count": 5}]
    common.print_table({"name": "name", ">count": "count"}, rows, title="Title")
    assert capsys.readouterr().out == "Title\nname    count\n日本  1234567\na\\nb        5\n"


def test_a_table_on_a_narrow_terminal_folds_names_and_cuts_no_figure(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    monkeypatch.setattr(common, "on_terminal", lambda: True)
    columns = {"name": "name", ">generated": "generated", ">reused": "reused", ">saved": lambda _: "99.9%"}
    rows = [
        {"name": "a name of five or six words", "generated": 1234567, "reused": 7654321},
        {"name": "b", "generated": 1, "reused": 2},
    ]
    common.print_table(columns, rows)
    shown = capsys.readouterr().out
    for whole in ("generated", "reused", "saved", "1,234,567", "7,654,321", "99.9%"):
        assert whole in shown
    assert "a name of" in shown
    assert "six words" not in shown.splitlines()[2]


def test_lines_are_printed_before_the_last_one_is_known(capsys):
    def lines():
        yield "first"
        assert capsys.readouterr().out == "first\n"
        yield "second"

    common.echo_lines(lines())
    assert capsys.readouterr().out == "second\n"


@pytest.mark.parametrize("folder", ["", "mysql://host"])
@pytest.mark.parametrize(
    "command", [["stats"], ["path"], ["serve", "--upstream", "http://h/v1"], ["run", "in.jsonl", "-o", "out"]]
)
def test_an_empty_name_and_a_url_are_no_folders(command, folder, tmp_path, monkeypatch):
    """Of a variable that is not set, the empty name would be the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    (tmp_path / "in.jsonl").write_text('{"prompt": "a", "model": "m"}')
    done = CliRunner().invoke(cli, [*command, "--cache", folder])
    assert done.exit_code == 2
    assert "a cache is a folder" in done.output
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_a_command_that_is_nearly_right_is_suggested():
    done = CliRunner().invoke(cli, ["stat"])
    assert done.exit_code == 2
    assert "Did you mean stats?" in done.output
    assert "Did you mean" not in CliRunner().invoke(cli, ["xyzzy"]).output


def test_the_folder_is_the_one_given_else_the_environments_else_the_projects(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CACHEPIPE_DIR", raising=False)
    assert common.cache_in_use(None)[1] == "user"
    (tmp_path / "caches").mkdir()
    assert common.cache_in_use(None) == (tmp_path / "caches" / "default", "project")
    monkeypatch.setenv("CACHEPIPE_DIR", str(tmp_path / "env"))
    assert common.cache_in_use(None) == (tmp_path / "env", "CACHEPIPE_DIR")
    assert common.cache_in_use("mine") == (tmp_path / "mine", "--cache")


def test_looking_at_a_cache_that_is_not_there_makes_none_and_says_where_it_looked(tmp_path):
    missing = tmp_path / "missing"
    with pytest.raises(StoreError, match=r"missing \(named by --cache\) does not exist.*--cache DIR"):
        common.opened(str(missing)).__enter__()
    assert not missing.exists()


@pytest.mark.parametrize("command", [["ls"], ["stats"], ["show", "k2"], ["demo", "--prompts", "1"]])
def test_a_folder_that_cannot_be_looked_at_is_a_sentence(command, tmp_path):
    folder = tmp_path / ("x" * 300)
    result = CliRunner().invoke(cli, [*command, "--cache", str(folder)])
    assert (result.exit_code, result.stdout) == (2, "")
    assert re.fullmatch(
        r"Error: the .*folder .* cannot be (read|opened): .*File name too long.*\n", result.stderr
    )


def test_the_path_of_a_folder_that_cannot_be_looked_at_is_printed_all_the_same(tmp_path):
    folder = tmp_path / ("x" * 300)
    result = CliRunner().invoke(cli, ["path", "--json", "--cache", str(folder)])
    assert json.loads(result.stdout) == {"path": str(folder), "exists": False, "named_by": "--cache"}


def test_an_empty_folder_and_a_file_are_no_caches(tmp_path):
    with pytest.raises(StoreError, match="does not contain one"):
        common.opened(str(tmp_path)).__enter__()
    assert list(tmp_path.iterdir()) == []
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(StoreError, match="is not a bundle of cachepipe"):
        common.opened(str(file)).__enter__()
    with pytest.raises(StoreError, match="is a bundle, which is only read"):
        common.opened(str(file), write=True).__enter__()


def test_a_diskcache_of_somebody_elses_is_no_cache(tmp_path):
    diskcache.Cache(str(tmp_path)).close()
    before = sorted(tmp_path.iterdir())
    with pytest.raises(StoreError, match=r"as a cache: it has no ledger\.cache\.db\. Check"):
        common.opened(str(tmp_path)).__enter__()
    assert sorted(tmp_path.iterdir()) == before


def test_a_damaged_cache_is_a_sentence(tmp_path):
    for name in ("ledger.cache.db", "cache.db"):
        (tmp_path / name).write_bytes(b"this is no database" * 100)
    with pytest.raises(StoreError, match="cannot be read"):
        common.opened(str(tmp_path)).__enter__()


def test_styles_are_for_terminals_without_no_color(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert common.styled("text", bold=True) == "text"
    monkeypatch.setattr(terminal, "on_terminal", lambda: True)
    assert common.styled("text", bold=True) == click.style("text", bold=True)
    monkeypatch.setenv("NO_COLOR", "1")
    assert common.styled("text", bold=True) == "text"


# The group.


def test_help_lists_each_command_in_its_order_and_imports_none():
    code = "import sys; from cachepipe.cli import main\ntry:\n main()\nfinally:\n print(*sys.modules)"
    ran = subprocess.run(
        [sys.executable, "-c", code, "--help"], capture_output=True, text=True, timeout=60, check=True
    )
    *help_lines, modules = ran.stdout.splitlines()
    listed = [line.split()[0] for line in help_lines[help_lines.index("Commands:") + 1 :]]
    assert listed == list(COMMANDS)
    heavy = {"openai", "rich", "diskcache", "h11", "asyncio", "cachepipe.cli.run", "cachepipe.cli.inspect"}
    assert heavy.isdisjoint(modules.split())


def test_importing_the_command_line_imports_nothing():
    code = "import cachepipe.cli, sys; print(*sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert {"click", "openai", "rich", "cachepipe.cli.group"}.isdisjoint(ran.stdout.split())


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_help_of_its_own(name):
    result = CliRunner().invoke(cli, [name, "--help"])
    assert result.exit_code == 0
    assert result.output.startswith(f"Usage: cli {name}")


def test_a_command_that_is_not_there_is_a_usage_error():
    result = CliRunner().invoke(cli, ["nonsense"])
    assert result.exit_code == 2
    assert "No such command 'nonsense'" in result.stderr


def test_the_version_is_the_packages():
    assert CliRunner().invoke(cli, ["--version"]).output == f"cachepipe {cachepipe.__version__}\n"


@pytest.mark.skipif(os.name == "nt", reason="pipes end otherwise there")
def test_a_warning_is_a_sentence_on_the_errors_stream():
    code = (
        "import warnings; from cachepipe.cli import group\n"
        "from cachepipe.errors import NotStored\n"
        "@group.cli.command()\ndef warn():\n warnings.warn('it was not stored', NotStored)\n"
        "group.cli.entries = {}; group.start(['warn'])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert (ran.stdout, ran.stderr) == ("", "Warning: it was not stored\n")


def test_ctrl_c_while_a_command_is_still_imported_is_no_failure_of_the_command(monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(group.importlib, "import_module", interrupted)
    done = CliRunner().invoke(cli, ["stats"])
    assert (done.exit_code, done.stdout, done.stderr) == (130, "", "Interrupted.\n")
