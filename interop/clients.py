"""Asks `bevel serve` with the clients that people use: `openai`, `anthropic` and `langchain-openai`; and with
`schemathesis`, which sends what the server's OpenAPI document allows and what it forbids.

    python interop/clients.py [--model smollm2] [--bevel target/release/bevel]

Clients are installed into `target/clients` the first time. Each check prints a line; the exit status is 1 where one
failed. A model without a chat template or tools of its own is served with the template beside this script.
"""

import argparse
import json
import subprocess
import sys
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PACKAGES = ["openai==3.57.0", "anthropic==2.14.0", "langchain-openai==1.7.4", "schemathesis==4.32.5"]

SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}


def checks(url: str, model: str):
    """Name and function of each check."""
    import anthropic
    import openai
    from langchain_core.messages import HumanMessage
    from langchain_openai import ChatOpenAI
    from pydantic import BaseModel, Field

    client = openai.OpenAI(base_url=f"{url}/v1", api_key="secret")
    claude = anthropic.Anthropic(base_url=url, api_key="secret")
    messages = [{"role": "user", "content": "Say hello."}]
    tools = [{"type": "function", "function": {"name": "weather", "description": "Tells the weather", "parameters": SCHEMA}}]
    common = {"model": model, "seed": 1, "temperature": 0}
    # Anthropic's client does not know it any more.
    greedy = {"temperature": 0}

    class Trip(BaseModel):
        city: str = Field(max_length=20)
        days: int = Field(ge=1, le=9)

    def openai_models():
        assert model in [m.id for m in client.models.list()]
        assert client.models.retrieve(model).id == model

    def openai_chat():
        answer = client.chat.completions.create(messages=messages, max_tokens=16, logprobs=True, top_logprobs=2, n=2, **common)
        assert len(answer.choices) == 2 and answer.usage.completion_tokens > 0
        assert len(answer.choices[0].logprobs.content[0].top_logprobs) == 2
        return answer.choices[0].message.content

    def openai_chat_stream():
        whole = client.chat.completions.create(messages=messages, max_tokens=16, **common).choices[0]
        text, usage, finish = "", None, None
        for chunk in client.chat.completions.create(messages=messages, max_tokens=16, stream=True, stream_options={"include_usage": True}, **common):
            if chunk.usage:
                usage = chunk.usage
            for choice in chunk.choices:
                text += choice.delta.content or ""
                finish = choice.finish_reason or finish
        assert text == whole.message.content and finish == whole.finish_reason and usage.total_tokens > 0

    def openai_completions():
        answer = client.completions.create(prompt=["Once upon a time", "In the beginning"], max_tokens=8, logprobs=1, **common)
        assert [c.index for c in answer.choices] == [0, 1] and answer.choices[0].logprobs.tokens
        return answer.choices[0].text

    def openai_parse():
        answer = client.chat.completions.parse(messages=messages, max_tokens=120, response_format=Trip, **common)
        trip = answer.choices[0].message.parsed
        assert isinstance(trip, Trip)
        return trip

    def openai_tools():
        answer = client.chat.completions.create(messages=messages, tools=tools, tool_choice="required", parallel_tool_calls=False, max_tokens=120, **common)
        call = answer.choices[0].message.tool_calls[0]
        assert answer.choices[0].finish_reason == "tool_calls" and set(json.loads(call.function.arguments)) == {"city", "days"}
        follow_up = messages + [answer.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "Rain."}]
        assert client.chat.completions.create(messages=follow_up, tools=tools, max_tokens=8, **common).choices
        return call.function.arguments

    def openai_tools_stream():
        with client.chat.completions.stream(messages=messages, tools=tools, tool_choice="required", parallel_tool_calls=False, max_tokens=120, **common) as stream:
            for _ in stream:
                pass
            final = stream.get_final_completion()
        assert final.choices[0].message.tool_calls[0].function.name == "weather"

    def openai_responses():
        answer = client.responses.create(model=model, input="Say hello.", instructions="Be brief.", max_output_tokens=16, temperature=0)
        assert answer.output_text and answer.usage.output_tokens > 0
        text = ""
        for event in client.responses.create(model=model, input="Say hello.", instructions="Be brief.", max_output_tokens=16, temperature=0, stream=True):
            if event.type == "response.output_text.delta":
                text += event.delta
        assert text == answer.output_text
        return text

    def openai_responses_tools():
        flat = [{"type": "function", "name": "weather", "parameters": SCHEMA, "strict": True}]
        answer = client.responses.create(model=model, input="Weather?", tools=flat, tool_choice="required", parallel_tool_calls=False, temperature=0)
        assert answer.output[0].type == "function_call" and json.loads(answer.output[0].arguments)

    def openai_errors():
        for arguments, kind in [
            ({"temperature": -1}, openai.BadRequestError),
            ({"model": "gpt-4"}, openai.NotFoundError),
            ({"extra_body": {"mystery": 1}}, openai.BadRequestError),
        ]:
            try:
                client.chat.completions.create(**{"model": model, "messages": messages, **arguments})
            except kind as error:
                assert error.body["message"], error
            else:
                raise AssertionError(f"{arguments} was not refused")
        try:
            openai.OpenAI(base_url=f"{url}/v1", api_key="wrong").models.list()
        except openai.AuthenticationError:
            return
        raise AssertionError("a wrong key was let in")

    def anthropic_messages():
        answer = claude.messages.create(model=model, max_tokens=16, system="Be brief.", messages=messages, extra_body=greedy)
        assert answer.content[0].type == "text" and answer.usage.output_tokens > 0
        with claude.messages.stream(model=model, max_tokens=16, system="Be brief.", messages=messages, extra_body=greedy) as stream:
            text = "".join(stream.text_stream)
            assert stream.get_final_message().stop_reason == answer.stop_reason
        assert text == answer.content[0].text
        counted = claude.messages.count_tokens(model=model, system="Be brief.", messages=messages).input_tokens
        assert counted == answer.usage.input_tokens + answer.usage.cache_read_input_tokens
        return text

    def anthropic_tools():
        offered = [{"name": "weather", "description": "Tells the weather", "input_schema": SCHEMA}]
        answer = claude.messages.create(model=model, max_tokens=120, messages=messages, tools=offered, tool_choice={"type": "any", "disable_parallel_tool_use": True})
        call = answer.content[0]
        assert call.type == "tool_use" and answer.stop_reason == "tool_use" and set(call.input) == {"city", "days"}
        follow_up = messages + [
            {"role": "assistant", "content": answer.content},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": "Rain."}]},
        ]
        assert claude.messages.create(model=model, max_tokens=8, messages=follow_up, tools=offered).content is not None

    def anthropic_errors():
        try:
            claude.messages.create(model=model, max_tokens=8, messages=[])
        except anthropic.BadRequestError as error:
            assert error.body["error"]["type"] == "invalid_request_error"
            return
        raise AssertionError("no messages were not refused")

    def langchain():
        chat = ChatOpenAI(base_url=f"{url}/v1", api_key="secret", model=model, temperature=0, max_tokens=16)
        whole = chat.invoke([HumanMessage("Say hello.")]).content
        assert "".join(part.content for part in chat.stream([HumanMessage("Say hello.")])) == whole

        roomy = ChatOpenAI(base_url=f"{url}/v1", api_key="secret", model=model, temperature=0, max_tokens=300)
        assert isinstance(roomy.with_structured_output(Trip, method="json_schema").invoke("A trip"), Trip)
        assert isinstance(roomy.with_structured_output(Trip, method="function_calling").invoke("A trip"), Trip)

    return [f for name, f in sorted(locals().items()) if callable(f) and name.startswith(("openai_", "anthropic_", "langchain")) and f.__module__ == __name__]


def inside(url: str, model: str) -> int:
    """Runs the checks: in the environment that has the clients."""
    failed = 0
    for check in checks(url, model):
        try:
            result = check()
        except Exception as error:  # noqa: BLE001: whatever it is, it is a failed check
            failed += 1
            print(f"FAILED {check.__name__}: {type(error).__name__}: {error}")
        else:
            print(f"ok     {check.__name__}" + (f": {str(result)!r}" if result is not None else ""))
    return 1 if failed else 0


def schemathesis(program: Path, url: str, examples: int) -> int:
    """Whether every answer is as the document says: none says that the server is at fault, and nothing is accepted that the
    document forbids. That all it allows is accepted cannot be: some fields need others, or a template that knows them."""
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance," \
             "negative_data_rejection,unsupported_method,ignored_auth"
    command = [program, "run", f"{url}/openapi.json", "--checks", checks, "--max-examples", str(examples), "--warnings", "off",
               "--header", "Authorization: Bearer secret", "--continue-on-failure", "--request-timeout", "60", "--seed", "1", "--no-color"]
    # It leaves what it found where it runs.
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=program.parent.parent)
    cases = [line.strip() for line in run.stdout.splitlines() if "generated" in line or line.lstrip().startswith(("- ST", "❌"))]
    print(f"{'ok  ' if run.returncode == 0 else 'FAIL'} schemathesis: {'; '.join(cases)}")
    if run.returncode:
        print(run.stdout[-200000:])
    return run.returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--bevel", type=Path, default=ROOT / "target/release/bevel")
    parser.add_argument("--examples", type=int, default=50, help="cases of schemathesis for each route")
    parser.add_argument("--inside", metavar="URL", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        return inside(args.inside, args.model)
    environment = ROOT / "target/clients"
    python = environment / "bin/python"
    if not python.exists():
        venv.create(environment, with_pip=True)
    subprocess.run([python, "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
    command = [args.bevel, "serve", args.model, "--name", "served", "--port", "0", "--ctx", "1024", "--json", "--api-key", "secret", "--chat-template", HERE / "tools.jinja"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            ready = ""
            for line in server.stdout:
                ready += line
                if line.startswith("}") or line.rstrip().endswith("}"):
                    break
            url = json.loads(ready)["url"]
            clients = subprocess.run([python, __file__, "--inside", url, "--model", "served"]).returncode
            document = schemathesis((environment / "bin/schemathesis").absolute(), url, args.examples)
            return clients or document
        finally:
            server.terminate()


if __name__ == "__main__":
    sys.exit(main())
