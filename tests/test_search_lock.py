"""Two searches on one directory: the second is refused, unless the first was killed."""

import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

import peft_autoqra
from peft_autoqra.errors import SearchStateError
from peft_autoqra.search_lock import search_lock

HOLDER = """
import pathlib, sys, time, types
package = types.ModuleType("peft_autoqra")  # without its __init__, which imports torch
package.__path__ = [sys.argv[1]]
sys.modules["peft_autoqra"] = package
from peft_autoqra.search_lock import search_lock
with search_lock(pathlib.Path(sys.argv[2])):
    print("locked", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of ``tmp_path / "out"``."""
    package = Path(peft_autoqra.__file__).parent
    command = [sys.executable, "-c", HOLDER, str(package), str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "locked\n"
        yield process
        process.kill()


def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path, holder):
    with pytest.raises(SearchStateError, match=r"Another search is running in .*out.*also when it is killed"):
        search_lock(tmp_path / "out").__enter__()
    with search_lock(tmp_path / "elsewhere"):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with search_lock(tmp_path / "out"):
        pass


def test_a_second_search_of_the_same_process_is_refused_until_the_first_ends(tmp_path):
    with suppress(KeyboardInterrupt), search_lock(tmp_path):
        with pytest.raises(SearchStateError, match="Another search is running"), search_lock(tmp_path):
            pass
        with pytest.raises(SearchStateError, match="Another search is running"), search_lock(tmp_path):
            pass  # a refusal does not open it
        raise KeyboardInterrupt
    with search_lock(tmp_path):
        pass


def test_a_directory_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SearchStateError, match=r"file.out cannot be written to .*another output_dir"):
        search_lock(tmp_path / "file" / "out").__enter__()
