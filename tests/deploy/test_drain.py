"""What the preStop hook asks of Ray: a node is emptied while clients stream, and none fails."""

import threading
import time

import openai
import pytest

from tests.deploy.local_cluster import LocalCluster, skip_unless_the_port_is_free

NUM_CLIENTS = 3
DRAIN_S = 90

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


class Clients:
    """Threads that stream one completion after the other.

    Attributes:
        outcomes: Of each request, the reason that it ended, or an error.
    """

    def __init__(self, base_url):
        self._base_url = base_url
        self._is_over = threading.Event()
        self.outcomes = []
        self._threads = [threading.Thread(target=self._run) for _ in range(NUM_CLIENTS)]

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._is_over.set()
        for thread in self._threads:
            thread.join()

    def wait_for_outcomes(self):
        """Each client has begun another request, and ended it."""
        enough = len(self.outcomes) + 2 * NUM_CLIENTS
        while len(self.outcomes) < enough:
            time.sleep(0.1)

    def _run(self):
        with openai.OpenAI(base_url=f"{self._base_url}/v1", api_key="x", max_retries=0) as client:
            while not self._is_over.is_set():
                try:
                    self.outcomes.append(self._stream(client))
                except openai.OpenAIError as error:
                    self.outcomes.append(repr(error))

    def _stream(self, client):
        stream = client.completions.create(
            model="gllm-ray-demo",
            prompt="def f(",
            max_tokens=200,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        return [chunk.choices[0].finish_reason for chunk in stream][-1]


@pytest.fixture
def cluster():
    skip_unless_the_port_is_free()
    with LocalCluster(worker_cpus=[2, 2]) as cluster:
        yield cluster


def node_of_the_replica(cluster):
    (actor,) = [
        actor
        for actor in cluster.list("actors")
        if "LLMServer" in actor["class_name"] and actor["state"] == "ALIVE"
    ]
    return actor["node_id"]


def test_a_drained_node_empties_itself_and_no_request_fails(cluster):
    base_url = cluster.deploy_overlay("dev-cpu")
    node = node_of_the_replica(cluster)
    with Clients(base_url) as clients:
        clients.wait_for_outcomes()
        result = cluster.run(
            *("ray", "drain-node", "--node-id", node, "--address", cluster.gcs_address),
            *("--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "a test"),
            *("--deadline-remaining-seconds", str(DRAIN_S)),
        )
        assert result.returncode == 0, result.stderr
        deadline_s = time.monotonic() + DRAIN_S
        while node in cluster.living_nodes():
            assert time.monotonic() < deadline_s, "the node did not leave"
            time.sleep(1)
        clients.wait_for_outcomes()
    assert set(clients.outcomes) == {"length"}
    assert node_of_the_replica(cluster) != node
