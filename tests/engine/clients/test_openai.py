"""OpenAI's own client against a running server, as its documentation uses it."""

import asyncio

import openai
import pytest
from asking import CONTEXT, ENDLESS, MESSAGES, MODEL, PROMPT, SHAPED, Place, chat, complete
from openai import AsyncOpenAI, OpenAI

pytestmark = [pytest.mark.engine, pytest.mark.slow]

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather at a place",
        "parameters": Place.model_json_schema(),
        # Without it vLLM lets arguments be any JSON.
        "strict": True,
    },
}


def test_models(client):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.list().data[0].max_model_len == CONTEXT


def test_completion(client):
    answer = complete(client)
    assert answer.object == "text_completion"
    assert answer.model == MODEL
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].text


def test_completion_of_several_prompts(client):
    prompts = [PROMPT, "Alice", "The Queen said"]
    together = complete(client, prompt=prompts)
    assert [choice.index for choice in together.choices] == [0, 1, 2]
    alone = [complete(client, prompt=prompt).choices[0].text for prompt in prompts]
    assert [choice.text for choice in together.choices] == alone


def test_echo(client):
    assert complete(client, echo=True).choices[0].text.startswith(PROMPT)


def test_chat(client):
    answer = chat(client)
    assert answer.object == "chat.completion"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == complete(client).choices[0].text


def test_chat_sends_every_message(client):
    """The example's template joins messages by an empty line."""
    turns = [
        {"role": "system", "content": "Alice"},
        {"role": "user", "content": [{"type": "text", "text": "was"}]},
        {"role": "assistant", "content": "here"},
        {"role": "user", "content": "and"},
    ]
    joined = complete(client, prompt="Alice\n\nwas\n\nhere\n\nand")
    answer = chat(client, messages=turns)
    assert answer.choices[0].message.content == joined.choices[0].text
    assert answer.usage.prompt_tokens == joined.usage.prompt_tokens


def test_streams_are_the_whole(client):
    chunks = list(complete(client, stream=True))
    assert len(chunks) > 2
    text = "".join(chunk.choices[0].text for chunk in chunks)
    assert text == complete(client).choices[0].text
    deltas = [chunk.choices[0].delta for chunk in chat(client, stream=True)]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == text


def test_stream_of_several_choices(client):
    """Chunks of different choices come as they are made; the index tells them apart."""
    options = {"n": 3, "temperature": 1, "seed": 5}
    texts = ["", "", ""]
    for chunk in complete(client, stream=True, **options):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in complete(client, **options).choices]


def test_usage(client):
    usage = complete(client).usage
    assert usage.completion_tokens == 12
    assert usage.total_tokens == usage.prompt_tokens + 12
    assert usage.prompt_tokens == chat(client).usage.prompt_tokens


@pytest.mark.parametrize("ask", [complete, chat])
def test_usage_of_a_stream_comes_last(client, ask):
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == []
    assert chunks[-1].usage == ask(client).usage
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_stop(client):
    whole = complete(client, max_tokens=30).choices[0].text
    word = whole.split()[3]
    stopped = complete(client, max_tokens=30, stop=[word, "never written"])
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.choices[0].text == whole[: whole.index(word)]
    streamed = list(chat(client, max_tokens=30, stop=word, stream=True))
    assert streamed[-1].choices[0].finish_reason == "stop"
    content = "".join(chunk.choices[0].delta.content or "" for chunk in streamed)
    assert content == stopped.choices[0].text


def test_logprobs(client):
    """At temperature 0 the token written is the likeliest, and chat and completion agree."""
    given = complete(client, logprobs=3).choices[0].logprobs
    assert len(given.tokens) == len(given.token_logprobs) == 12
    for token, logprob, top in zip(
        given.tokens, given.token_logprobs, given.top_logprobs, strict=True
    ):
        assert logprob <= 0
        assert logprob == max(top.values())
        assert token in top
    entries = chat(client, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    assert [entry.token for entry in entries] == given.tokens
    assert [entry.logprob for entry in entries] == pytest.approx(given.token_logprobs, abs=0.05)
    for entry in entries:
        assert bytes(entry.bytes).decode(errors="replace") == entry.token
        assert len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].logprob == max(top.logprob for top in entry.top_logprobs)


def test_n(client):
    answer = chat(client, n=4, temperature=1, seed=3)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert len({choice.message.content for choice in answer.choices}) > 1
    assert answer.usage.completion_tokens == 48


def test_seed(client):
    def text(seed: int) -> str:
        return complete(client, temperature=1, seed=seed, max_tokens=20).choices[0].text

    assert text(1) == text(1)
    assert len({text(seed) for seed in range(4)}) > 1


def test_logit_bias(client):
    token = 65
    answer = complete(client, logit_bias={str(token): 100}, extra_body={"return_token_ids": True})
    assert answer.choices[0].token_ids == [token] * 12


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "get_weather"}}]
)
def test_tool_call(client, choice):
    answer = chat(client, tools=[WEATHER], tool_choice=choice, **SHAPED)
    (call,) = answer.choices[0].message.tool_calls
    assert call.type == "function"
    assert call.function.name == "get_weather"
    Place.model_validate_json(call.function.arguments)


def test_tool_call_streamed(client):
    options = {"tools": [WEATHER], "tool_choice": "required", **SHAPED}
    calls = [
        call
        for chunk in chat(client, stream=True, **options)
        for choice in chunk.choices
        for call in choice.delta.tool_calls or ()
    ]
    assert {call.index for call in calls} == {0}
    assert "".join(call.function.name or "" for call in calls) == "get_weather"
    Place.model_validate_json("".join(call.function.arguments or "" for call in calls))


def test_tool_result_is_sent_back(client):
    call = {"id": "1", "type": "function", "function": {"name": "get_weather", "arguments": "{}"}}
    turns = [
        *MESSAGES,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "it rains"},
    ]
    assert chat(client, messages=turns, tools=[WEATHER]).choices[0].message.content


def test_tool_that_the_model_does_not_call(client):
    """tool_choice is "auto" where tools are given: an answer in words stays one."""
    message = chat(client, tools=[WEATHER]).choices[0].message
    assert message.content
    assert not message.tool_calls


def test_json_schema(client):
    answer = chat(
        client,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "place", "schema": Place.model_json_schema(), "strict": True},
        },
        **SHAPED,
    )
    assert answer.choices[0].finish_reason == "stop"
    Place.model_validate_json(answer.choices[0].message.content)


def test_parsed_into_a_class(client):
    answer = client.chat.completions.parse(
        model=MODEL, messages=MESSAGES, response_format=Place, temperature=0, **SHAPED
    )
    assert isinstance(answer.choices[0].message.parsed, Place)


def test_json_object(client):
    answer = chat(client, response_format={"type": "json_object"}, max_tokens=60, stop="}")
    assert answer.choices[0].message.content.lstrip().startswith("{")


def test_responses(client):
    answer = client.responses.create(
        model=MODEL, input=PROMPT, max_output_tokens=12, temperature=0, store=False
    )
    assert answer.output_text == complete(client).choices[0].text
    assert answer.usage.output_tokens == 12


def test_responses_streamed(client):
    options = {"model": MODEL, "input": PROMPT, "max_output_tokens": 12, "temperature": 0}
    events = list(client.responses.create(**options, stream=True))
    assert [events[0].type, events[-1].type] == ["response.created", "response.completed"]
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == complete(client).choices[0].text


def test_many_at_once(server, client):
    """Each answer is the one that its prompt gets alone."""
    prompts = [f"{PROMPT} {word}" for word in ("Alice", "the", "a", "his", "she", "it", "I", "no")]

    async def ask() -> list[str]:
        async with AsyncOpenAI(base_url=client.base_url, api_key=client.api_key) as several:
            answers = await asyncio.gather(
                *(
                    several.completions.create(
                        model=MODEL, prompt=prompt, max_tokens=12, temperature=0
                    )
                    for prompt in prompts
                )
            )
        return [answer.choices[0].text for answer in answers]

    assert asyncio.run(ask()) == [complete(client, prompt=p).choices[0].text for p in prompts]


@pytest.mark.parametrize("ask", [complete, chat])
def test_stream_that_is_closed_is_aborted(client, metric, wait_until_running, ask):
    before = metric("vllm:generation_tokens_total")
    stream = ask(client, stream=True, **ENDLESS)
    next(iter(stream))
    wait_until_running(ENDLESS["n"])
    stream.close()
    wait_until_running(0)
    assert metric("vllm:generation_tokens_total") - before < ENDLESS["n"] * ENDLESS["max_tokens"]


@pytest.mark.parametrize("ask", [complete, chat])
def test_client_that_gives_up_is_aborted(client, metric, wait_until_running, ask):
    before = metric("vllm:generation_tokens_total")
    with pytest.raises(openai.APITimeoutError):
        ask(client.with_options(timeout=0.5), **ENDLESS)
    wait_until_running(0)
    assert metric("vllm:generation_tokens_total") - before < ENDLESS["n"] * ENDLESS["max_tokens"]


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"model": "gpt-4"}, openai.NotFoundError, ("`gpt-4` does not exist", "model")),
        ({"max_tokens": 2000}, openai.BadRequestError, ("2000", "max_tokens")),
        ({"temperature": -1}, openai.BadRequestError, ("temperature", "temperature")),
        ({"top_p": 2}, openai.BadRequestError, ("top_p", "top_p")),
        ({"n": 0}, openai.BadRequestError, ("n must be", None)),
        ({"stop": 5}, openai.BadRequestError, ("stop", "stop")),
        ({"stream_options": {"include_usage": True}}, openai.BadRequestError, ("stream", None)),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("ask", [complete, chat])
def test_error(client, ask, options, error, said):
    with pytest.raises(error) as raised:
        ask(client, **options)
    text, param = said
    assert text in raised.value.message
    assert param is None or param in raised.value.param
    assert {"message", "type", "param", "code"} <= raised.value.body.keys()
    assert raised.value.body["code"] == raised.value.status_code


@pytest.mark.parametrize("stream", [False, True])
def test_prompt_that_is_too_long(client, stream):
    long = "day " * CONTEXT
    for ask in (
        lambda: complete(client, prompt=long, stream=stream),
        lambda: chat(client, messages=[{"role": "user", "content": long}], stream=stream),
    ):
        with pytest.raises(openai.BadRequestError, match=f"{CONTEXT} tokens") as raised:
            ask()
        assert raised.value.body["code"] == 400


def test_schema_that_is_none(client):
    schema = {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "nonsense"}}}
    with pytest.raises(openai.BadRequestError):
        chat(client, response_format=schema)


def test_body_that_is_no_json(client):
    with pytest.raises(openai.BadRequestError) as raised:
        client.post(
            "/completions",
            content=b"{",
            cast_to=object,
            options={"headers": {"Content-Type": "application/json"}},
        )
    assert "JSON" in raised.value.message


@pytest.mark.parametrize("key", ["", "wrong", "a key of this tes"])
def test_wrong_key(server, key):
    stranger = OpenAI(base_url=f"{server.url}/v1", api_key=key or "x", max_retries=0)
    if not key:
        stranger = stranger.with_options(default_headers={"Authorization": ""})
    with pytest.raises(openai.AuthenticationError) as raised:
        complete(stranger)
    assert raised.value.status_code == 401
    assert "Bearer" in raised.value.message
    assert raised.value.body["code"] == "invalid_api_key"


def test_what_there_is_not(client):
    with pytest.raises(openai.NotFoundError) as raised:
        client.images.generate(prompt="a cat", model=MODEL)
    assert raised.value.body["code"] == 404


def test_stream_that_fails_is_raised(client):
    """vLLM finds that a prompt is empty when it has begun this stream."""
    stream = client.responses.create(model=MODEL, input="", stream=True)
    with pytest.raises(openai.APIError, match="cannot be empty"):
        list(stream)


def test_log_has_no_key(server, client):
    complete(client)
    assert client.api_key not in server.log.read_text()
