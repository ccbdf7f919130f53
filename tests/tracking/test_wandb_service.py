"""Tests with a dying or unresponsive wandb service and a busy machine: no row is lost, and no wait is long."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from metaformer.tracking.service import child_processes
from metaformer.tracking.wandb import SUPERSEDED_PREFIX
from tests.conftest import REPOSITORY, link_fewer_validation_images, rows
from tests.faults.conftest import status
from tests.tracking.test_wandb import SMALL, STEPS_PER_EPOCH, assert_history_is_that_of_the_file, wandb_logs
from tests.tracking.wandb_log import WandbLog, read_wandb_log
from tests.tracking.wandb_server import WandbServer, serve_wandb

pytestmark = pytest.mark.whole

EPOCHS = 30
STEPS = EPOCHS * STEPS_PER_EPOCH
HELD_AT = STEPS * 2 // 3  # enough rows for wandb-core to write the first ones to its file
PROGRAM = REPOSITORY / "tests" / "faults" / "program.py"
OPENS_AND_CLOSES = REPOSITORY / "tests" / "tracking" / "open_and_close.py"


@pytest.fixture(scope="module", name="images")
def fewer_images(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The training images and 20 validation images, since a run validates many times."""
    return link_fewer_validation_images(images, tmp_path_factory.mktemp("fewer"), 5)


@contextmanager
def training(
    images: Path, run_dir: Path, *options: str, server: WandbServer | None = None
) -> Iterator["subprocess.Popen[str]"]:
    """Run train.py as a user does, offline or with a server; after two thirds of its steps it waits for `let_go`."""
    command = [sys.executable, str(PROGRAM), f"data.root={images}", *SMALL, f"epochs={EPOCHS}"]
    command += [f"run_dir={run_dir}", "tracking=offline" if server is None else "tracking=wandb", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    environment |= {"FAULTS": f"0:{HELD_AT + 1}:wait", "GO": str(run_dir.parent / "go")}
    if server is not None:
        command += ["tracking.artifacts=false"]  # the test server does not support them
        environment |= {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": "0123456789" * 4}
        environment |= {"WANDB__FILE_STREAM_TRANSMIT_INTERVAL": "1"}  # seconds between two uploads of rows
    with (run_dir.parent / "stderr").open("w") as stderr:
        program = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=stderr, text=True)
    try:
        yield program
    finally:
        program.kill()
        program.communicate()


def let_go(run_dir: Path) -> None:
    """Let training continue to its end."""
    (run_dir.parent / "go").touch()


def finish(program: "subprocess.Popen[str]", run_dir: Path) -> list[str]:
    """Let training end, check that it succeeds, and return its output lines about wandb."""
    let_go(run_dir)
    stdout, _ = program.communicate(timeout=180)
    stderr = (run_dir.parent / "stderr").read_text()
    assert program.returncode == 0, stderr
    assert '"top1"' in stdout.splitlines()[-1]
    assert len(rows(run_dir)) == STEPS
    return [line for line in stderr.splitlines() if "wandb" in line]


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def services(program: "subprocess.Popen[str]") -> list[int]:
    """Return the living wandb services of a training program."""
    found = []
    for process in (child for tracker in child_processes(program.pid) for child in child_processes(tracker)):
        try:
            if Path(f"/proc/{process}/stat").read_text().rpartition(" ")[0].split(" (wandb-core) ")[1][0] != "Z":
                found.append(process)
        except (OSError, IndexError):
            continue  # the process has ended, or is another program
    return found


def records_rows(program: "subprocess.Popen[str]", run_dir: Path) -> bool:
    """Return whether wandb is open and has rows."""
    return bool(services(program)) and any(
        file.stat().st_size > 20_000 for file in (run_dir / "wandb").glob("offline-run-*/run-*.wandb")
    )


def superseded(run_dir: Path) -> int:
    """Return the number of wandb starts that a later start has superseded."""
    return len(list((run_dir / "wandb").glob(f"{SUPERSEDED_PREFIX}offline-run-*")))


@pytest.mark.parametrize("when", ["starting", "recording", "ending"])
def test_a_killed_service_is_restarted(images: Path, tmp_path: Path, when: str) -> None:
    """SIGKILL to wandb-core when it starts, between rows, or when it hangs after the end of training.

    It is reported in one line, and every row is in the one folder that remains to be uploaded.
    """
    run_dir = tmp_path / "run"
    with training(images, run_dir) as program:
        wait_for(lambda: bool(services(program)) if when == "starting" else records_rows(program, run_dir))
        (service,) = services(program)
        if when == "ending":
            os.kill(service, signal.SIGSTOP)
            let_go(run_dir)
            wait_for(lambda: status(run_dir)["state"] == "done")
        os.kill(service, signal.SIGKILL)
        first, *other_lines = finish(program, run_dir)
    assert "; restarting it with all rows; training continues" in first
    assert when == "starting" or "its service, wandb-core, died (signal 9)" in first
    assert all(line.startswith("waiting      until wandb has ") for line in other_lines), other_lines
    (log,) = wandb_logs(run_dir)
    assert log.exit_code == 0
    assert log.run_id == (run_dir / "wandb_id").read_text().strip()
    assert_history_is_that_of_the_file(log, run_dir, last_step=STEPS)
    assert when == "starting" or superseded(run_dir) == 1


def test_a_service_that_dies_again_is_disabled(images: Path, tmp_path: Path) -> None:
    """Both deaths are reported at once, the second with the upload command; training completes as usual."""
    run_dir = tmp_path / "run"
    with training(images, run_dir) as program:
        for deaths in range(2):
            wait_for(lambda: superseded(run_dir) == deaths and records_rows(program, run_dir))  # noqa: B023
            (service,) = services(program)
            os.kill(service, signal.SIGKILL)
        warnings = finish(program, run_dir)
    first, second = [line for line in warnings if line.startswith("warning: ")]
    assert "its service, wandb-core, died (signal 9); restarting it" in first
    (folder,) = (run_dir / "wandb").glob("offline-run-*")
    assert second.endswith(
        f"died (signal 9); disabled from now on; training continues; `wandb sync {folder}` uploads what it has; "
        "the run folder has all rows"
    )


def test_a_service_that_does_not_answer_is_given_up(images: Path, tmp_path: Path) -> None:
    """With SIGSTOP to wandb-core, closing reports what it waits for, then how to upload, and leaves no process."""
    run_dir = tmp_path / "run"
    with training(images, run_dir, "tracking.close_seconds=4") as program:
        wait_for(lambda: records_rows(program, run_dir))
        (service,) = services(program)
        os.kill(service, signal.SIGSTOP)
        waiting, warning = finish(program, run_dir)
    assert waiting.startswith("waiting      until wandb has ")
    assert waiting.endswith((", or for 2 s without progress", ", or for 3 s without progress")), waiting
    (folder,) = (run_dir / "wandb").glob("offline-run-*")
    assert warning.startswith("warning: wandb: no progress in 4 s; still missing: ")
    assert warning.endswith(f"; `wandb sync {folder}` uploads what it has; the run folder has all rows")
    wait_for(lambda: not Path(f"/proc/{service}").exists() or "Z" in Path(f"/proc/{service}/stat").read_text())


def test_online_every_row_is_sent(images: Path, tmp_path: Path) -> None:
    """With a working server, all rows arrive in order, without a warning."""
    run_dir = tmp_path / "run"
    with serve_wandb() as server, training(images, run_dir, server=server) as program:
        lines = finish(program, run_dir)
    assert [line for line in lines if line.startswith("warning: ")] == []
    assert_history_is_that_of_the_file(WandbLog(history=server.history), run_dir, last_step=STEPS)
    assert server.exit_code == 0


def test_online_a_killed_service_sends_each_row_once(images: Path, tmp_path: Path) -> None:
    """After SIGKILL to wandb-core, the next start sends exactly the rows that the server does not have."""
    run_dir = tmp_path / "run"
    with serve_wandb() as server, training(images, run_dir, server=server) as program:
        wait_for(lambda: len(server.history) > 20)
        (service,) = services(program)
        os.kill(service, signal.SIGKILL)
        assert len(server.history) < STEPS
        first, *other_lines = finish(program, run_dir)
    assert "its service, wandb-core, died (signal 9); restarting it" in first
    assert [line for line in other_lines if line.startswith("warning: ")] == []
    assert_history_is_that_of_the_file(WandbLog(history=server.history), run_dir, last_step=STEPS)
    assert server.exit_code == 0


def test_online_a_server_that_falls_silent_is_given_up(images: Path, tmp_path: Path) -> None:
    """Unanswered requests are no progress: closing ends after its limit and gives the upload command."""
    run_dir = tmp_path / "run"
    with serve_wandb() as server, training(images, run_dir, "tracking.close_seconds=4", server=server) as program:
        wait_for(lambda: len(server.history) > 20)
        server.silent.set()
        assert server.exit_code is None
        lines = finish(program, run_dir)
    assert len(lines) == 2, lines
    waiting, warning = lines
    assert waiting.startswith("waiting      until wandb has ")
    (folder,) = (run_dir / "wandb").glob("run-*")
    assert warning.startswith("warning: wandb: no progress in 4 s; still missing: the end of the run; ")
    assert f"`wandb sync {folder}` uploads what it has" in warning
    logged = [row["step"] for row in read_wandb_log(folder).history if "train/loss" in row]
    assert len(logged) > 20
    assert (
        logged == [row["step"] for row in rows(run_dir)][: len(logged)]
    )  # the last rows are still in wandb-core's memory


def test_a_server_that_does_not_open_the_run(images: Path, tmp_path: Path) -> None:
    """If the server never answers, the run continues offline with every row, and one line reports it."""
    run_dir = tmp_path / "run"
    with serve_wandb() as server:
        server.silent.set()
        with training(images, run_dir, server=server) as program:
            lines = finish(program, run_dir)
    (warning,) = [line for line in lines if line.startswith("warning: ")]
    assert warning.startswith("warning: wandb: cannot go online, the run is offline (")
    (log,) = wandb_logs(run_dir)
    assert_history_is_that_of_the_file(log, run_dir, last_step=STEPS)


def test_a_killed_training_leaves_no_process(images: Path, tmp_path: Path) -> None:
    """After SIGKILL to training, wandb's processes end by themselves."""
    run_dir = tmp_path / "run"
    with training(images, run_dir) as program:
        wait_for(lambda: records_rows(program, run_dir))
        processes = [*child_processes(program.pid), *services(program)]
        program.kill()
        for process in processes:
            wait_for(
                lambda pid=process: (
                    not Path(f"/proc/{pid}").exists()  # type: ignore[misc]
                    or ") Z " in Path(f"/proc/{pid}/stat").read_text()
                )
            )


@pytest.mark.parametrize("starts", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_starts_in_a_row_on_a_busy_machine(tmp_path: Path, starts: int) -> None:
    """Processes in turn log to wandb beside two busy processes: every row is recorded, without a warning."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    try:
        for number in range(starts):
            run_dir = tmp_path / str(number)
            command = [sys.executable, str(OPENS_AND_CLOSES), str(run_dir), str(10 * number)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
            assert (done.returncode, done.stderr) == (0, ""), number
            (log,) = wandb_logs(run_dir)
            assert log.exit_code == 0
            assert [row["step"] for row in log.history] == [row["step"] for row in rows(run_dir)]
            assert len(log.history) == 10 * number
    finally:
        for process in busy:
            process.kill()
            process.wait()
