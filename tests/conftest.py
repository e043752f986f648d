"""
What the tests share: a project to run scripts in, and a finished run to look at.

The helpers live in files of their own:

    project.py          Project: a copy of the checkout, whose scripts are run like a user would
    fork_server.py      starts those scripts without importing torch each time
    toy.py              small made-up datasets
    runs.py             are two runs the same?
    fault_helpers.py    for fault_injection.py: slow servers, small disks

Tests import the most common ones from here, for example `from conftest import TINY, Project`.
"""
# First, because it limits threads before torch is imported
from project import CHECKOUT, SHARED, TINY, Project, ranks  # isort: skip

import pytest
from runs import assert_same_run, read_log, same, same_run
from toy import make_pairs, make_toy, toy_text

__all__ = [
    'CHECKOUT', 'SHARED', 'TINY', 'Project', 'ranks', 'assert_same_run', 'read_log',
    'same', 'same_run', 'make_pairs', 'make_toy', 'toy_text',
]


@pytest.fixture
def project(tmp_path):
    """A fresh Project with the dataset data/toy. Its folder's name has a space and an umlaut."""
    project = Project(tmp_path / 'pocket übung')
    make_toy(project.root)
    return project


@pytest.fixture(scope='session')
def trained(tmp_path_factory):
    """A Project with a finished run out/toy: look at it, don't change it.

    Its attributes stdout and stderr hold what train.py printed.
    """
    project = Project(tmp_path_factory.mktemp('trained'))
    make_toy(project.root)
    project.stdout, project.stderr = project.train()
    return project
