"""LangChain's OpenAI client against a running server."""

import asyncio
from typing import Any

import openai
import pytest
from asking import ENDLESS, MODEL, PROMPT, SHAPED, Place, chat, complete
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from langchain_openai import OpenAI as Completion

pytestmark = [pytest.mark.engine, pytest.mark.slow]


@tool(args_schema=Place)
def get_weather(city: str, unit: str, sunny: bool) -> str:
    """The weather at a place"""
    return f"{city}: {sunny} {unit}"


def model(client: openai.OpenAI, **options: Any) -> ChatOpenAI:
    given = {"model": MODEL, "temperature": 0, "max_tokens": 12, "max_retries": 0, **options}
    return ChatOpenAI(
        base_url=str(client.base_url), api_key=client.api_key, stream_usage=True, **given
    )


def test_completion(client):
    written = Completion(
        model=MODEL,
        base_url=str(client.base_url),
        api_key=client.api_key,
        temperature=0,
        max_tokens=12,
    )
    text = complete(client).choices[0].text
    assert written.invoke(PROMPT) == text
    assert "".join(written.stream(PROMPT)) == text


def test_chat(client):
    answer = model(client).invoke([HumanMessage(PROMPT)])
    expected = chat(client)
    assert answer.content == expected.choices[0].message.content
    assert answer.usage_metadata["output_tokens"] == 12
    assert answer.usage_metadata["input_tokens"] == expected.usage.prompt_tokens
    assert answer.response_metadata["finish_reason"] == "length"


def test_chain(client):
    prompt = ChatPromptTemplate.from_messages([("system", "Alice"), ("user", "{said}")])
    chain = prompt | model(client) | StrOutputParser()
    messages = [SystemMessage("Alice"), HumanMessage("and")]
    assert chain.invoke({"said": "and"}) == model(client).invoke(messages).content


def test_stream(client):
    chunks = list(model(client).stream(PROMPT))
    assert len(chunks) > 2
    whole = sum(chunks[1:], chunks[0])
    assert whole.content == chat(client).choices[0].message.content
    assert whole.usage_metadata["output_tokens"] == 12


def test_batch(client):
    prompts = [PROMPT, "Alice", "The Queen said"]
    answers = asyncio.run(model(client).abatch(prompts))
    assert all(answer.content for answer in answers)
    assert answers[0].content == model(client).invoke(PROMPT).content


def test_stop_and_seed(client):
    whole = model(client).invoke(PROMPT).content
    word = whole.split()[3]
    assert model(client).invoke(PROMPT, stop=[word]).content == whole[: whole.index(word)]
    drawn = [model(client, temperature=1, seed=3).invoke(PROMPT).content for _ in range(2)]
    assert drawn[0] == drawn[1]


def test_n(client):
    several = model(client, n=3, temperature=1, seed=3).generate([[HumanMessage(PROMPT)]])
    assert len({generation.text for generation in several.generations[0]}) > 1


def test_logprobs(client):
    answer = model(client, logprobs=True, top_logprobs=2).invoke(PROMPT)
    entries = answer.response_metadata["logprobs"]["content"]
    assert "".join(entry["token"] for entry in entries) == answer.content
    assert all(len(entry["top_logprobs"]) == 2 for entry in entries)


def test_tool(client):
    """The model asks for the tool, the tool answers, and the model takes that."""
    asked = model(client, **SHAPED).bind_tools([get_weather], tool_choice="required", strict=True)
    answer = asked.invoke(PROMPT)
    (call,) = answer.tool_calls
    assert answer.invalid_tool_calls == []
    result = get_weather.invoke(call)
    assert isinstance(result, ToolMessage)
    turns = [HumanMessage(PROMPT), answer, result]
    assert isinstance(model(client).bind_tools([get_weather]).invoke(turns), AIMessage)


def test_tool_streamed(client):
    asked = model(client, **SHAPED).bind_tools(
        [get_weather], tool_choice="get_weather", strict=True
    )
    chunks = list(asked.stream(PROMPT))
    (call,) = sum(chunks[1:], chunks[0]).tool_calls
    assert call["name"] == "get_weather"
    Place.model_validate(call["args"])


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output(client, method):
    shaped = model(client, **SHAPED).with_structured_output(Place, method=method, strict=True)
    assert isinstance(shaped.invoke(PROMPT), Place)


def test_stream_that_is_left_is_aborted(client, metric, wait_until_running):
    before = metric("vllm:generation_tokens_total")
    stream = model(client, **ENDLESS).stream(PROMPT)
    next(stream)
    stream.close()
    wait_until_running(0)
    assert metric("vllm:generation_tokens_total") - before < ENDLESS["n"] * ENDLESS["max_tokens"]


@pytest.mark.parametrize(
    ("options", "error", "code"),
    [
        ({"model": "gpt-4"}, openai.NotFoundError, 404),
        ({"max_tokens": 2000}, openai.BadRequestError, 400),
        ({"api_key": "wrong"}, openai.AuthenticationError, "invalid_api_key"),
    ],
    ids=["model", "max_tokens", "key"],
)
def test_error(server, client, options, error, code):
    given = {"model": MODEL, "api_key": client.api_key, "max_retries": 0, **options}
    asked = ChatOpenAI(base_url=str(client.base_url), **given)
    with pytest.raises(error) as raised:
        asked.invoke(PROMPT)
    assert raised.value.body["code"] == code
