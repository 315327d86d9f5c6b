"""`gllm-ray chat`, a process of its own, with our routes over a socket."""

import asyncio
import os
import pty
import signal
import sys
from contextlib import asynccontextmanager

import pytest

from gllm_ray.demo.serve_process import free_port
from gllm_ray.errors import PipelineError
from tests.fakes import LocalService, ScriptedPipeline
from tests.serving.local_api import listening, wait_until

ANSWER = "A list is a sequence."
COMMAND = [sys.executable, "-m", "gllm_ray.cli", "chat"]


@asynccontextmanager
async def serving(tokenizer, *, text=ANSWER, hold_after=None, **options):
    """Yield a service that gives one answer, and its address."""
    script = [*tokenizer.encode(text), *tokenizer.stop_token_ids]
    pipeline = ScriptedPipeline(script, hold_after=hold_after)
    async with (
        LocalService(tokenizer, pipeline) as service,
        listening(service, **options) as url,
    ):
        yield service, url


async def chat(*arguments, stdin=None, **environment):
    """The exit status of a command without a terminal, and what it printed."""
    process = await asyncio.create_subprocess_exec(
        *COMMAND,
        *arguments,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=os.environ | environment,
    )
    out, err = await process.communicate(stdin)
    return process.returncode, out.decode(), err.decode()


class Terminal:
    """The command on a terminal, and what it has shown."""

    def __init__(self, *arguments):
        self.shown = ""
        self._arguments = arguments

    async def __aenter__(self):
        self._ours, theirs = pty.openpty()
        self._process = await asyncio.create_subprocess_exec(
            *COMMAND,
            *self._arguments,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=os.environ | {"TERM": "dumb"},
            start_new_session=True,
        )
        os.close(theirs)
        asyncio.get_running_loop().add_reader(self._ours, self._read)
        return self

    async def __aexit__(self, *_):
        asyncio.get_running_loop().remove_reader(self._ours)
        os.close(self._ours)
        if self._process.returncode is None:
            self._process.kill()
            await self._process.wait()

    def _read(self):
        try:
            self.shown += os.read(self._ours, 4096).decode()
        except OSError:  # nobody has the other end
            asyncio.get_running_loop().remove_reader(self._ours)

    async def until_shown(self, text, times=1):
        async with asyncio.timeout(30):
            while self.shown.count(text) < times:  # noqa: ASYNC110 - only text comes from there
                await asyncio.sleep(0.01)

    def type(self, text):
        os.write(self._ours, text.encode())

    def press_ctrl_c(self):
        self._process.send_signal(signal.SIGINT)

    async def ended(self):
        return await asyncio.wait_for(self._process.wait(), 30)


def asked(service, tokenizer, index):
    """What the model has been shown for a request."""
    return tokenizer.decode(service.requests[index].prompt_token_ids)


@pytest.mark.parametrize("path", ["", "/", "/v1"])
def test_the_answer_to_a_question_is_all_that_is_printed(tokenizer, path):
    async def run():
        async with serving(tokenizer) as (service, url):
            address = ["--url", url + path]
            by_argument = await chat("What is it?", "--system", "Be brief.", *address)
            by_input = await chat(*address, "--params", '{"max_tokens": 2}', stdin=b"Who?\nHow?")
            prompts = [asked(service, tokenizer, index) for index in range(2)]
            return by_argument, by_input, prompts, service.requests[1].max_tokens

    by_argument, (status, out, err), prompts, max_tokens = asyncio.run(run())
    assert by_argument == (0, f"{ANSWER}\n", "")
    assert (status, err) == (0, "")
    assert ANSWER.startswith(out.removesuffix("\n"))
    assert max_tokens == 2
    assert "Be brief." in prompts[0]
    assert "What is it?" in prompts[0]
    assert "Who?\nHow?" in prompts[1]


def test_a_conversation_goes_on_until_it_is_cleared(tokenizer):
    async def run():
        async with serving(tokenizer) as (service, url), Terminal("--url", url) as terminal:
            await terminal.until_shown("> ")
            for number, line in enumerate(["first?", "second?", "/clear\nthird?"], 1):
                terminal.type(f"{line}\n")
                await terminal.until_shown(ANSWER, number)
                await terminal.until_shown("tokens/s", number)
            terminal.type("\x04")
            status = await terminal.ended()
            return status, [asked(service, tokenizer, index) for index in range(3)]

    status, (first, second, third) = asyncio.run(run())
    assert status == 0
    assert "first?" in first
    assert all(text in second for text in ("first?", ANSWER, "second?"))
    assert "third?" in third
    assert not any(text in third for text in ("first?", ANSWER, "second?"))


def test_ctrl_c_stops_an_answer_and_not_the_conversation(tokenizer):
    async def run():
        async with (
            serving(tokenizer, hold_after=3) as (service, url),
            Terminal("--url", url) as terminal,
        ):
            await terminal.until_shown("> ")
            terminal.type("go on\n")
            await wait_until(lambda: service.pipeline.num_tokens >= 3)
            await terminal.until_shown(ANSWER[:2])
            terminal.press_ctrl_c()
            await terminal.until_shown("(stopped)")
            service.pipeline.release()
            await service.until_idle()
            terminal.type("again\n")
            await terminal.until_shown(ANSWER)
            terminal.press_ctrl_c()
            return await terminal.ended()

    assert asyncio.run(run()) == 0


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--params", "[]"], "--params=[]: must be a JSON object"),
        (["--params", '{"temperature": -1}'], "temperature"),
        (["--params", '{"n": 2}'], "--params: n must be left out"),
        (["--api-key-env", "NO_KEY"], "--api-key-env=NO_KEY: there is no such variable"),
        (["--url", "here:8000"], "--url=here:8000: must be an address as http://host:port"),
        (["--url", "http://["], "http://[: is no service's address"),
    ],
)
def test_what_cannot_be_asked_is_told_in_one_line(tokenizer, arguments, reason):
    async def run():
        async with serving(tokenizer) as (_, url):
            return await chat("Why?", "--url", url, *arguments)

    status, out, err = asyncio.run(run())
    assert (status, out) == (1, "")
    assert reason in err
    assert len(err.splitlines()) == 1


def test_a_reader_that_leaves_ends_the_command_without_a_word(tokenizer):
    async def run():
        async with serving(tokenizer) as (_, url):
            reader, writer = os.pipe()
            os.close(reader)
            process = await asyncio.create_subprocess_exec(
                *COMMAND, "Why?", "--url", url, stdout=writer, stderr=asyncio.subprocess.PIPE
            )
            os.close(writer)
            _, err = await process.communicate()
            return process.returncode, err.decode()

    assert asyncio.run(run()) == (128 + signal.SIGPIPE, "")


def test_a_key_is_shown_and_its_absence_told(tokenizer):
    async def run():
        async with serving(tokenizer, api_keys=["secret"]) as (_, url):
            without = await chat("Why?", "--url", url, OPENAI_API_KEY="")
            return without, await chat("Why?", "--url", url, OPENAI_API_KEY="secret")

    (status, out, err), answered = asyncio.run(run())
    assert (status, out) == (1, "")
    assert "API key" in err
    assert answered == (0, f"{ANSWER}\n", "")


def test_a_service_that_is_not_there_or_fails_is_told(tokenizer):
    async def run():
        nobody = await chat("Why?", "--url", f"http://127.0.0.1:{free_port()}")
        async with serving(tokenizer, hold_after=3) as (service, url):
            task = asyncio.create_task(chat("Why?", "--url", url))
            await wait_until(lambda: service.pipeline.num_tokens >= 3)
            service.pipeline.failure = PipelineError("stage 1 broke")
            service.pipeline.release()
            return nobody, await task

    (status, out, err), (late_status, _, late_err) = asyncio.run(run())
    assert (status, out) == (1, "")
    assert "Connection refused; `gllm-ray serve FILE` starts a service" in err
    assert late_status == 1
    assert late_err.strip()
    assert "Traceback" not in late_err
