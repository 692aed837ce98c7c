import json
from pathlib import Path

import pytest

from attune_worker.cli.bulk import Results, job_of, read_lines
from attune_worker.errors import AttuneError, ConfigurationError
from attune_worker.jobs import JobResult, JobStatus


def lines_of(tmp_path: Path, *texts: bytes):
    """Return the lines of a file with these texts."""
    path = tmp_path / "jobs.jsonl"
    path.write_bytes(b"\n".join(texts))
    return list(read_lines(path))


def ended(status: JobStatus = JobStatus.SUCCEEDED) -> JobResult:
    """Return how some job ended."""
    return JobResult(job_id="job", status=status)


def test_a_line_is_known_by_its_id_or_else_by_its_number(tmp_path):
    """Ids may be text or whole numbers; blank lines count for the numbering and are nothing else."""
    lines = lines_of(tmp_path, b'{"id": "a", "prompt": "x"}', b"", b'{"id": 7}', b'{"prompt": "y"}')
    assert [(line.id, line.number, line.reason) for line in lines] == [("a", 1, None), ("7", 3, None), ("4", 4, None)]
    assert lines[0].fields == {"prompt": "x"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"not json", "not JSON"),
        (b"\xff\xfe", "not valid UTF-8"),
        (b"[1, 2]", "not list"),
        (b'"text"', "not str"),
        (b'{"id": true}', "'id' must be"),
        (b'{"id": ""}', "'id' must be"),
        (b'{"id": {"a": 1}}', "'id' must be"),
        (b"[" * 100_000, "not JSON"),
    ],
)
def test_a_line_that_is_no_job_says_why(tmp_path, text, said):
    """Whatever stands in a line, reading goes on and the line has its reason."""
    first, second = lines_of(tmp_path, text, b'{"id": "good"}')
    assert said in first.reason
    assert second.id == "good"
    assert second.reason is None


def test_the_second_line_with_an_id_is_invalid(tmp_path):
    """An id stands for one job, so the later line is refused and names the earlier one."""
    first, second = lines_of(tmp_path, b'{"id": "a"}', b'{"id": "a"}')
    assert first.reason is None
    assert "line 1" in second.reason
    assert second.id != first.id
    assert second.given_id == "a"


def test_jobs_of_one_run_have_one_key_and_other_runs_have_another(tmp_path):
    """The key follows from run, id and fields, so an interrupted run finds its jobs, and a new one does not."""
    [line, changed] = lines_of(tmp_path, b'{"id": "a", "prompt": "x"}', b'{"id": "b", "prompt": "x"}')
    assert job_of(line, "run-1") == job_of(line, "run-1")
    keys = {job_of(entry, run)["idempotency_key"] for entry in (line, changed) for run in ("run-1", "run-2")}
    assert len(keys) == 4


def test_a_line_keeps_an_idempotency_key_of_its_own(tmp_path):
    """A caller who chose a key meant it."""
    [line] = lines_of(tmp_path, b'{"idempotency_key": "mine"}')
    assert job_of(line, "run")["idempotency_key"] == "mine"


def test_results_remember_what_is_done_and_keep_their_run_until_it_is_finished(tmp_path):
    """An interrupted run goes on under the same id; a finished one starts anew."""
    [line] = lines_of(tmp_path, b'{"id": "a"}')
    path = tmp_path / "out.jsonl"
    with Results(path) as results:
        run_id = results.run_id
        results.add(line, ended())
    with Results(path) as results:
        assert results.done == {"a"}
        assert results.run_id == run_id
        results.finished()
    with Results(path) as results:
        assert results.run_id != run_id


def test_a_result_that_was_cut_off_is_dropped(tmp_path):
    """A process killed while writing leaves half a line, which must not stand before a whole one."""
    path = tmp_path / "out.jsonl"
    path.write_bytes(b'{"id": "a", "line": 1, "status": "succeeded"}\n{"id": "b", "sta')
    with Results(path) as results:
        assert results.done == {"a"}
    assert path.read_bytes() == b'{"id": "a", "line": 1, "status": "succeeded"}\n'


@pytest.mark.parametrize("content", [b"precious text\n", b'{"id": "a", "prompt": "a job"}\n', b"[1]\n[2]\n"])
def test_a_file_that_holds_no_results_is_left_alone(tmp_path, content):
    """A slip on the command line must not cost anybody a file."""
    path = tmp_path / "out.jsonl"
    path.write_bytes(content)
    with pytest.raises(ConfigurationError, match="line 1 is no result"), Results(path):
        pass
    assert path.read_bytes() == content


@pytest.mark.parametrize("status", [status for status in JobStatus if status.ended and status != "succeeded"])
def test_failed_results_are_dropped_only_on_request_and_then_run_as_new_jobs(tmp_path, status):
    """``retry_failed`` must not find the failed job again under its old key."""
    [good, bad] = lines_of(tmp_path, b'{"id": "good"}', b'{"id": "bad"}')
    path = tmp_path / "out.jsonl"
    with Results(path) as results:
        run_id = results.run_id
        results.add(good, ended())
        results.add(bad, ended(status))
    with Results(path) as results:
        assert results.done == {"good", "bad"}
    with Results(path, retry_failed=True) as results:
        assert results.done == {"good"}
        assert results.run_id != run_id


def test_invalid_lines_are_read_again_by_the_next_run(tmp_path):
    """The user corrects the line and runs again."""
    [line] = lines_of(tmp_path, b"nonsense")
    path = tmp_path / "out.jsonl"
    with Results(path) as results:
        results.add_invalid(line, line.reason)
    assert json.loads(path.read_text())["status"] == "invalid"
    with Results(path) as results:
        assert results.done == set()


def test_two_runs_cannot_write_to_one_file(tmp_path):
    """The second one is refused at once, also after the first has rewritten the file."""
    path = tmp_path / "out.jsonl"
    path.write_bytes(b"cut off")
    with Results(path), pytest.raises(AttuneError, match="another run"), Results(path):
        pass


def test_a_results_file_that_cannot_be_written_is_a_clear_error(tmp_path):
    """The message names the file."""
    with pytest.raises(ConfigurationError, match=r"missing.*out\.jsonl"), Results(tmp_path / "missing" / "out.jsonl"):
        pass
