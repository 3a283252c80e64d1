"""A real server on a small random model of bytes: sampling, grammars, thoughts and the cache are the real ones, and a token costs
under a millisecond. Its texts are printable ASCII; what ends them is what the request says."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from anyio import create_task_group
from torch import Tensor

from streamserve.api.app import create_app
from streamserve.api.encoders import EncoderModel
from streamserve.cache.kv_cache import KVCache
from streamserve.cache.pool import KVPool
from streamserve.config import ServerConfig
from streamserve.engine.client import Mailbox
from streamserve.engine.core import Engine, EngineOptions
from streamserve.engine.drafters.ngram import NgramDrafter
from streamserve.engine.grammar import Grammars
from streamserve.engine.policy import POLICIES
from streamserve.engine.runner import ModelRunner
from streamserve.engine.sampler import Sampler
from streamserve.engine.scheduler import Limits, Scheduler
from streamserve.engine.speculation import Speculation
from streamserve.engine.stages import SlotState, default_stages
from streamserve.engine.step_costs import StepCosts
from streamserve.messages import GenerateRequest
from streamserve.models.checkpoint import open_checkpoint
from streamserve.models.network import build_network
from streamserve.text.byte_tokenizer import byte_text_model
from streamserve.text.model import TextModel
from streamserve.text.template import ChatTemplate
from tests.e2e.serving import listening

PAGE_SIZE, NUM_PAGES, CONTEXT_LEN, MAX_RUNNING = 16, 1024, 4096, 8
STEP_TOKENS = 256
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 259,
    "max_position_embeddings": CONTEXT_LEN,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
# It reads every variable that a request can give it, and thinks where it is told to.
TEMPLATE = (
    "{% if reasoning_effort %}effort={{ reasoning_effort }}\n{% endif %}{% if verbosity %}verbosity={{ verbosity }}\n{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.reasoning_content %}{{ '<think>\n' + message.reasoning_content + '\n</think>\n' }}{% endif %}"
    "{{ message.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}"
    "{% if not enable_thinking %}{{ '\n</think>\n\n' }}{% endif %}{% endif %}"
)


class Printable:
    """A stage that keeps to printable ASCII unless a bias says otherwise."""

    def __init__(self, vocab_size: int) -> None:
        self._shift_V = torch.full((vocab_size,), -30.0)
        self._shift_V[32:127] = 0.0

    def wanted_by(self, slot: SlotState) -> bool:
        return True

    def apply(self, logits_V: Tensor, slot: SlotState) -> None:
        logits_V += self._shift_V


class WatchedEngine(Engine):
    """Writes down what it was asked."""

    def __init__(self, *args: object, **options: object) -> None:
        super().__init__(*args, **options)  # type: ignore[arg-type]
        self.requests: list[GenerateRequest] = []

    async def submit(self, request: GenerateRequest) -> Mailbox:
        self.requests.append(request)
        return await super().submit(request)


@dataclass(frozen=True)
class RandomServer:
    """What runs, and where."""

    engine: WatchedEngine
    scheduler: Scheduler
    text: TextModel
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@asynccontextmanager
async def random_server(folder: Path, *, encoder: EncoderModel | None = None) -> AsyncIterator[RandomServer]:
    """All of it, running. `folder` is an empty one."""
    (folder / "config.json").write_text(json.dumps(CONFIG))
    tokenizer = byte_text_model().tokenizer
    text = TextModel(tokenizer, ChatTemplate(TEMPLATE, special_tokens=tokenizer.special_tokens))
    vocab_size, eos = tokenizer.vocab_size, tokenizer.eos_token_ids
    checkpoint = open_checkpoint(folder, load_format="dummy")
    pool = KVPool(checkpoint.spec, num_pages=NUM_PAGES, page_size=PAGE_SIZE)
    sampler = Sampler(vocab_size, (Printable(vocab_size), *default_stages(eos)))
    network = build_network(checkpoint, pool=pool, dtype="float32")
    runner = ModelRunner(network, pool, sampler, num_slots=MAX_RUNNING, max_len=CONTEXT_LEN)
    grammars = Grammars(tokenizer, vocab_size=vocab_size, eos_token_ids=eos, num_lanes=1)
    scheduler = Scheduler(
        KVCache(NUM_PAGES, PAGE_SIZE),
        Limits(MAX_RUNNING, STEP_TOKENS, eos),
        POLICIES["priority"],
        speculation=Speculation(NgramDrafter(4), StepCosts.free()),  # every guess is verified, so that all else meets them
    )
    options = EngineOptions(CONTEXT_LEN, vocab_size, eos, seed=0)
    engine = WatchedEngine(scheduler, runner, options, grammars=grammars)
    app = create_app(engine, text, ServerConfig(), model_name="tiny", aliases=("small",), encoder=encoder)
    async with create_task_group() as tasks:
        tasks.start_soon(engine.run)
        async with listening(app) as port:
            yield RandomServer(engine, scheduler, text, port)
        tasks.cancel_scope.cancel()
    runner.close()
    grammars.close()
