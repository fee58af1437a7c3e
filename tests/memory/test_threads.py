"""The threads that really run; each environment in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from edgetrain.config import Settings
from edgetrain.errors import InputError
from edgetrain.memory import threads
from edgetrain.training import job

TEAM = """
import ctypes, torch
from edgetrain.config import Settings
from edgetrain.memory.threads import _openmp
from edgetrain.training.job import method_of, with_defaults
from edgetrain.training.process import process_state

settings = Settings()
settings = with_defaults(settings, method_of(settings))
openmp, team = _openmp(), []
region = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda data: team.append(openmp.omp_get_num_threads()))
with process_state(settings):
    openmp.GOMP_parallel(region, None, 0, 0)
print(settings.threads, team[0])
"""


@pytest.mark.skipif(threads.thread_limit() is None, reason="no OpenMP library was found")
@pytest.mark.parametrize(
    ("environment", "expected"),
    [({}, 2), ({"OMP_THREAD_LIMIT": "1"}, 1), ({"OMP_THREAD_LIMIT": "3"}, 2), ({"OMP_DYNAMIC": "true"}, None)],
)
def test_the_threads_of_a_run_are_those_that_a_parallel_region_gets(environment, expected):
    environment = {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE", **environment}
    done = subprocess.run(
        [sys.executable, "-c", TEAM], env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )
    settled, team = map(int, done.stdout.split())
    assert settled == team
    assert expected in (team, None)


def test_more_threads_than_openmp_gives_are_refused(monkeypatch):
    monkeypatch.setattr(job, "thread_limit", lambda: 1)
    with pytest.raises(InputError, match="--threads 2: OMP_THREAD_LIMIT allows 1 .* set OMP_THREAD_LIMIT=2 or unset"):
        job.open_job(Settings(threads=2))
    assert job.open_job(Settings()).settings.threads == 1
    monkeypatch.setattr(job, "thread_limit", lambda: None)
    assert job.open_job(Settings(threads=2)).settings.threads == 2
