"""Every file that a command opens is in the folders it was given, and none of them is executed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from resmoe_dist.testing.corpus import byte_tokenizer
from resmoe_dist.user_cache import cache_root
from tests.checkpoints.damage import edit_text
from tests.models import FAMILIES, compress, save_family

REPOSITORY = Path(__file__).parents[2]

# The hook sees Python's own opens; the places are those of Python, its packages and the system.
CHILD = """
import json, os, sys, sysconfig

PROGRAMS = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "pickle.find_class")
opened, executed = [], []

def note(event, arguments):
    if event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)):
        opened.append(os.fsdecode(arguments[0]))
    elif event in PROGRAMS:
        executed.append(event + " " + str(arguments[:2]))

from resmoe_dist.cli.main import COMMANDS, run_command
from resmoe_dist.launch import compress, evaluate, infer
from resmoe_dist.cli import checkpoint, plan
import resmoe_dist.runtime.generation
sys.addaudithook(note)
given, report = sys.argv[1:]
for arguments in json.loads(given):
    if arguments[0] == "infer":
        sys.argv = arguments
        infer.run()
    else:
        assert run_command(arguments) == 0, arguments
own = {os.path.realpath(p) for p in (sys.prefix, sys.base_prefix, *sys.path) if p}
json.dump({"opened": opened, "executed": executed, "own": sorted(own)}, open(report, "w"))
"""


@pytest.mark.slow
def test_commands_open_only_files_of_the_folders_they_are_given(tmp_path):
    inputs, outputs = tmp_path / "inputs", tmp_path / "outputs"
    outputs.mkdir()
    save_family(FAMILIES["mixtral"], inputs / "s", vocab_size=300)
    byte_tokenizer(padding_side="left").save_pretrained(inputs / "s")
    compress(inputs / "s", inputs / "c", groups=2)
    edit_text(inputs / "text", "some text to score")
    # What a folder must not be able to ask for.
    (inputs / "c" / "code.py").write_text("raise SystemExit('executed')")
    report = outputs / "report.json"
    commands = [
        ["compress", inputs / "s", outputs / "c", "--ep", "2"],
        ["verify", outputs / "c"],
        ["plan", inputs / "c"],
        ["inspect", inputs / "c", "--json", outputs / "i.json"],
        ["restore", inputs / "c", outputs / "d"],
        ["evaluate", inputs / "c", "--text", inputs / "text", "--json", outputs / "e.json"],
        ["evaluate", inputs / "s", "--text", inputs / "text"],
        ["infer", "--model", inputs / "c", "--prompt", "import", "--max-new-tokens", "2"],
    ]
    given = json.dumps([[str(part) for part in command] for command in commands])

    done = subprocess.run(
        [sys.executable, "-c", CHILD, given, report],
        capture_output=True,
        text=True,
        timeout=200,
        cwd=REPOSITORY,
    )

    assert done.returncode == 0, done.stderr
    found = json.loads(report.read_text())
    system = ["/dev", "/proc", "/sys", "/etc", "/usr", "/lib"]
    package = REPOSITORY / "resmoe_dist"
    allowed = [*map(Path, [*found["own"], *system]), package, cache_root().resolve(), tmp_path]
    paths = {(REPOSITORY / path).resolve() for path in found["opened"]}
    assert [p for p in sorted(paths) if not any(p.is_relative_to(a) for a in allowed)] == []
    read = {p for p in paths if p.is_relative_to(tmp_path)}
    assert [p for p in read if not (p.is_relative_to(inputs) or p.is_relative_to(outputs))] == []
    # The test sees the reads that it is about.
    assert inputs / "c" / "config.json" in read
    assert [what for what in found["executed"] if str(tmp_path) in what or "pickle" in what] == []
