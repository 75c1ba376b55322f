"""What the tests of clients ask the example model."""

from typing import Literal

import openai
from openai import OpenAI
from pydantic import BaseModel

MODEL = "tiny"
PROMPT = "It was a fine day, and"
MESSAGES = [{"role": "user", "content": PROMPT}]
CONTEXT = 1024
# Takes the engine seconds, wherever it runs: only an abort ends it early.
ENDLESS = {"n": 16, "max_tokens": 1000, "temperature": 1, "extra_body": {"ignore_eos": True}}
# The penalty: a model this small writes on and on the white space that JSON allows.
SHAPED = {"max_tokens": 200, "frequency_penalty": 2}


class Place(BaseModel):
    """A schema with no free text: a model of 4 million parameters fills it in a few tokens."""

    city: Literal["Paris", "London"]
    unit: Literal["celsius", "fahrenheit"]
    sunny: bool


def complete(client: OpenAI, **options) -> openai.types.Completion:
    given = {"model": MODEL, "prompt": PROMPT, "max_tokens": 12, "temperature": 0, **options}
    return client.completions.create(**given)


def chat(client: OpenAI, **options) -> openai.types.chat.ChatCompletion:
    given = {"model": MODEL, "messages": MESSAGES, "max_tokens": 12, "temperature": 0, **options}
    return client.chat.completions.create(**given)
