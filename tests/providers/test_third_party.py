import subprocess
import sys
import textwrap

ADAPTER = '''
import json

from attune_worker.errors import BadRequestError
from attune_worker.jobs import Usage
from attune_worker.providers.base import Answer, HttpRequest


class Parrot:
    """A wire format of its own, told in another's words."""

    def misfit(self, temperature, stop):
        return None

    def build(self, endpoint, chat):
        prompt = chat.messages[-1].content
        body = {"model": chat.model_id, "max_tokens": 50, "messages": [{"role": "user", "content": prompt}]}
        headers = {"x-api-key": endpoint.api_key, "anthropic-version": "2023-06-01", "content-type": "application/json"}
        return HttpRequest(f"{endpoint.base_url}/v1/messages", headers, json.dumps(body).encode())

    def parse(self, response):
        answer = json.loads(response.body)
        usage = Usage(input_tokens=answer["usage"]["input_tokens"], output_tokens=answer["usage"]["output_tokens"])
        return Answer("parrot: " + answer["content"][0]["text"], "stop", usage)

    def failure(self, response):
        return BadRequestError("no")
'''

PROGRAM = """
from attune_worker import EmpathyLLMExecutor

response = EmpathyLLMExecutor().run("summarize", "Polly.", model="ara-1")
print(response.content, response.provider, response.cost_usd)
"""

CONFIGURATION = """
[providers.zoo]
kind = "parrot"
base_url = "{url}"
api_key = "polly"

[[models]]
id = "ara-1"
provider = "zoo"
tier = "cheap"
input_cost_per_million = 1
output_cost_per_million = 2
"""


def test_an_installed_package_adds_a_provider_by_its_entry_point(tmp_path, simulator):
    """Nothing of attune-worker is touched: a distribution with an entry point, and a table in attune.toml."""
    installed = tmp_path / "site"
    described = installed / "parrot_llm-1.0.dist-info"
    described.mkdir(parents=True)
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: parrot-llm\nVersion: 1.0\n")
    (described / "entry_points.txt").write_text("[attune_worker.providers]\nparrot = parrot_llm:Parrot\n")
    (installed / "parrot_llm.py").write_text(textwrap.dedent(ADAPTER))
    simulator.profile = simulator.profile.model_copy(update={"api_keys": ("polly",)})
    (tmp_path / "attune.toml").write_text(CONFIGURATION.format(url=simulator.url))
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=tmp_path,
        env={"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    usage = simulator.invoice()["calls"][0]["usage"]
    expected = (usage["input_tokens"] + 2 * usage["output_tokens"]) / 1_000_000
    text, cost = ran.stdout.rsplit(" zoo ")
    assert text.startswith("parrot: Polly.")
    assert float(cost) == expected
