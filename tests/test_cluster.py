"""Jobs dealt out to processes of a cluster, by a stand-in for Ray whose processes die when they are told to."""

import pickle
from types import SimpleNamespace

import pytest

from moemerge.cluster import Cluster
from moemerge.errors import CheckpointError, ConfigError, MoemergeError, RefusedError, TooLargeError


class RayError(Exception):
    """As of Ray: a process is gone."""


class RayTaskError(RayError):
    """As of Ray: a method raised."""

    def __init__(self, cause):
        super().__init__(f"task: {cause}")
        self.cause = cause


class Ray:
    """What `Cluster` uses of Ray: a process answers when it is waited for, and dies after so many jobs."""

    exceptions = SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError)

    def __init__(self, lives, cpus=8):
        self.lives, self.cpus, self.made, self.killed = lives, cpus, [], []

    def cluster_resources(self):
        return {"CPU": float(self.cpus)}

    def remote(self, kind):
        def make(*arguments):
            life = self.lives[min(len(self.made), len(self.lives) - 1)]  # the last of them is that of all further ones
            self.made.append(Actor(kind(*arguments), life))
            return self.made[-1]

        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=make))

    def wait(self, references, timeout):
        assert timeout
        return references[-1:], references[:-1]

    def get(self, reference):
        return reference()

    def kill(self, actor):
        self.killed.append(actor)


class Actor:
    def __init__(self, made, life):
        self.life = life
        self.check = SimpleNamespace(remote=lambda: lambda: self.answer(made.check, 0))
        self.run = SimpleNamespace(remote=lambda job: lambda: self.answer(lambda: made.run(job), 1))

    def answer(self, method, cost):
        self.life -= cost
        if self.life < 0:
            self.life = -1000
            raise RayError("killed")
        try:
            return method()
        except MoemergeError as error:
            raise RayTaskError(pickle.loads(pickle.dumps(error))) from error  # noqa: S301


class Worker:
    def __init__(self, done):
        self.done = done

    def check(self):
        if self.done is None:
            raise ConfigError("no:", ["place"])

    def run(self, job):
        if job == "bad":
            raise RefusedError("a bad job")
        self.done.append(job)
        return f"did {job}"


def dealt(lives, count, jobs=range(20), cpus=8, done=()):
    ray, found = Ray(lives, cpus), None if done is None else list(done)
    return ray, found, Cluster(ray).dealt(Worker, (found,), jobs, count)


@pytest.mark.parametrize("lives", [[99], [0, 2, 99], [-1, 99], [5, 5, 5, 0, 0, 99], [3, 3, 3, 3, 3, 3, 2, 2, 2]])
def test_every_job_is_done_once_whoever_dies(lives):
    ray, done, given = dealt(lives, 3)
    assert sorted(given) == [(job, f"did {job}") for job in range(20)]
    assert sorted(done) == list(range(20))
    assert ray.killed == ray.made


def test_where_all_died_the_last_words_are_given():
    ray, done, given = dealt([1], 2)
    with pytest.raises(MoemergeError) as raised:
        list(given)
    assert str(raised.value) == "all processes of the Ray cluster died: killed"
    assert (len(done), len(ray.made)) == (6, 6)
    assert ray.killed == ray.made


def test_what_a_process_raises_is_raised_and_all_are_ended():
    ray, _, given = dealt([99], 2, ["good", "bad", "good", "never"])
    with pytest.raises(RefusedError, match=r"^a bad job$"):
        list(given)
    assert ray.killed == ray.made
    _, _, given = dealt([99], 1, done=None)
    with pytest.raises(ConfigError) as raised:
        list(given)
    assert raised.value.problems == ("place",)


def test_a_cluster_without_room_is_refused_and_without_jobs_nothing_begins():
    _, _, given = dealt([99], 3, cpus=2)
    with pytest.raises(RefusedError) as refused:
        list(given)
    assert str(refused.value) == ("--workers 3: the cluster has 2 CPUs, and each process takes one. Ask for 2 at most.")
    ray, _, given = dealt([99], 1, [])
    assert (list(given), ray.made) == ([], [])


@pytest.mark.parametrize(
    "error", [CheckpointError("a\x1b[31m b"), TooLargeError("x: holds 1e9", "Widen it"), ConfigError("no:", ["a", "b"])]
)
def test_an_error_is_the_same_in_another_process(error):
    same = pickle.loads(pickle.dumps(error))  # noqa: S301  its own
    assert (type(same), str(same), vars(same)) == (type(error), str(error), vars(error))
