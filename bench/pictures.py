"""Pictures beside text on a GPU: how much later tokens of text streams come while other requests bring pictures.

    python bench/pictures.py [--folder FOLDER] [--requests 64] [--streams 64] [--side 1024] [--rounds 1] [--steps] [--json OUT]
        [-- FLAGS]

Without --folder the model is one of Qwen2.5-VL 7B's architecture with random weights, whose config, chat template and byte-level
tokenizer are written to a temporary folder. `--small` takes a small one of the same family: for work on the bench itself.

A server in a process of its own. `--streams` texts are streamed throughout. In each round, beside them, come at once `--requests`
chats with a PNG of their own each (data: URLs), and later as many text prompts of as many tokens: the control, which says what
prompts cost without pictures. Printed for each of the three times (`alone`, `pictures`, `control`): times between tokens of the
text streams and their ratio to `alone`, first tokens of those that came beside, pictures and prompt tokens per second, and the
processor time of the server as cores; what pictures cost beyond the control is their loading, decoding and preparation. Exit code
1 if a request fails or an encoder ran more or less often than there are pictures.
"""

import argparse
import base64
import io
import json
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.load import Figures, Streams, ask, drive, failures, percentile, random_tokens
from bench.machine import machine, shown
from bench.report import Result
from bench.server import Server, split_arguments
from bench.steps import Steps
from streamserve.benchmark.answers import Answer
from streamserve.benchmark.client import Ask

TEXT_PROMPT, ANSWER = 128, 64
BEGIN_S, ALONE_S, GAP_S = 2.0, 3.0, 1.5  # until streams are under way; what they are looked at alone; between the others
QUESTION = "What is in this picture?"
IMAGE = "<|image_pad|>"
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", IMAGE)
FIRST_SPECIAL, VOCAB_SIZE = 151_643, 152_064
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] in ('image', 'image_url') %}<|vision_start|>" + IMAGE + "<|vision_end|>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT_7B = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
}
VISION_7B = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "out_hidden_size": 3584,
    "fullatt_block_indexes": [7, 15, 23, 31],
}
TEXT_SMALL = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
VISION_SMALL = {
    "depth": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_heads": 2,
    "out_hidden_size": 256,
    "fullatt_block_indexes": [1],
}


# ---- the model -------------------------------------------------------------------------------------------------------------


def write_model(folder: Path, *, is_small: bool) -> None:
    """config.json, tokenizer and template: all but the weights."""
    text, vision = (TEXT_SMALL, VISION_SMALL) if is_small else (TEXT_7B, VISION_7B)
    head_dim = text["hidden_size"] // text["num_attention_heads"]
    sections = [head_dim // 8, head_dim * 3 // 16, head_dim * 3 // 16]
    words = {name: FIRST_SPECIAL + at for at, name in enumerate(SPECIALS)}
    config = {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        **text,
        "hidden_act": "silu",
        "max_position_embeddings": 32_768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": sections},
        "tie_word_embeddings": False,
        "vocab_size": VOCAB_SIZE,
        "bos_token_id": words["<|endoftext|>"],
        "eos_token_id": words["<|im_end|>"],
        "image_token_id": words[IMAGE],
        "vision_start_token_id": words["<|vision_start|>"],
        "vision_end_token_id": words["<|vision_end|>"],
        "vision_config": {
            **vision,
            "model_type": "qwen2_5_vl",
            "in_channels": 3,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "spatial_patch_size": 14,
            "window_size": 112,
            "hidden_act": "silu",
        },
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    (folder / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "image_processor_type": "Qwen2VLImageProcessor",
                "min_pixels": 56 * 56,
                "max_pixels": 28 * 28 * 16_384,
                "patch_size": 14,
                "merge_size": 2,
                "temporal_patch_size": 2,
            }
        )
    )
    ends = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Qwen2TokenizerFast", "chat_template": TEMPLATE, **ends})
    )
    write_tokenizer(folder / "tokenizer.json", VOCAB_SIZE)


def write_tokenizer(path: Path, vocab_size: int) -> None:
    """One token for every byte, and words that no text becomes, but that a model without sense may say."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocab = {letter: at for at, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocab |= {f"Ġw{at}": at for at in range(len(vocab), FIRST_SPECIAL)}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    reserved = (f"<|reserved_{at}|>" for at in range(FIRST_SPECIAL + len(SPECIALS), vocab_size))
    made.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in (*SPECIALS, *reserved)])
    made.save(str(path), pretty=False)


# ---- requests --------------------------------------------------------------------------------------------------------------


def png(side: int, seed: int) -> bytes:
    """Shapes on a shaded ground with a little noise: about as many bytes as a drawing or a screenshot has."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:side, 0:side]
    shade = (rows[..., None] * rng.integers(0, 128, 3) + columns[..., None] * rng.integers(0, 128, 3)) // side
    ground = shade + rng.integers(0, 4, (side, side, 1))
    picture = Image.fromarray(ground.astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for _ in range(24):
        x, y, size = (int(value) for value in rng.integers(0, side, 3) // (1, 1, 4))
        shape = draw.ellipse if rng.random() < 0.5 else draw.rectangle
        shape((x, y, x + size, y + size), fill=tuple(int(value) for value in rng.integers(0, 256, 3)))
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=6)
    return file.getvalue()


def chat(model: str, image: bytes, max_tokens: int) -> Ask:
    """A streamed chat that shows a picture and asks about it."""
    url = "data:image/png;base64," + base64.b64encode(image).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTION}]
    body = {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "max_completion_tokens": max_tokens,
        "temperature": 0.0,
        "ignore_eos": True,
    }
    return ask(body, path="/v1/chat/completions")


def text(model: str, rng: Random, num_prompt: int, max_tokens: int) -> Ask:
    """A streamed completion of random words."""
    prompt = random_tokens(rng, num_prompt, range(1000, 100_000))
    body = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0.0, "ignore_eos": True}
    return ask(body)


# ---- what is measured ------------------------------------------------------------------------------------------------------


class Meter:
    """Looks at the server's processor time all the while."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._seen: list[tuple[float, float]] = []
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._ends.wait(0.05):
            self._seen.append((time.perf_counter(), self._server.cpu_s()))

    def cpu_s(self, begin_s: float, end_s: float) -> float:
        """Processor time between two moments."""
        at, spent = zip(*self._seen, strict=True)
        return float(np.interp(end_s, at, spent) - np.interp(begin_s, at, spent))

    def close(self) -> None:
        """Stop looking."""
        self._ends.set()
        self._thread.join()


def gaps(streams: Sequence[Answer], begin_s: float, end_s: float) -> Figures:
    """Times between tokens that came within these moments."""
    found = [
        (later - before) * 1e3
        for answer in streams
        for before, later in zip(answer.events_s, answer.events_s[1:], strict=False)
        if begin_s <= later < end_s
    ]
    return {"itl_p50_ms": percentile(found, 50), "itl_p99_ms": percentile(found, 99), "itl_max_ms": max(found)}


def late(streams: Sequence[Answer], begin_s: float, end_s: float, over_ms: float) -> str:
    """When tokens came that far behind the one before them: how many in each half second."""
    counts = [0] * (int((end_s - begin_s) * 2) + 1)
    for answer in streams:
        for before, at in zip(answer.events_s, answer.events_s[1:], strict=False):
            if begin_s <= at < end_s and (at - before) * 1e3 > over_ms:
                counts[int((at - begin_s) * 2)] += 1
    return f"gaps over {over_ms:.1f} ms, by half seconds: {' '.join(map(str, counts))}"


def beside(answers: Sequence[Answer], streams: Sequence[Answer], meter: Meter, *, is_chat: bool) -> Figures:
    """Figures of the time from the first request of these to the end of the last. A chat's first event only says who speaks."""
    begin_s, end_s = min(one.sent_s for one in answers), max(one.events_s[-1] for one in answers)
    firsts = [one.events_s[1 if is_chat and len(one.events_s) > 1 else 0] for one in answers]
    first_ms = [(at - one.sent_s) * 1e3 for at, one in zip(firsts, answers, strict=True)]
    took_s = max(firsts) - begin_s
    return gaps(streams, begin_s, end_s) | {
        "ttft_p50_ms": percentile(first_ms, 50),
        "ttft_p99_ms": percentile(first_ms, 99),
        "prompts_s": len(answers) / took_s,
        "prompt_tokens_s": sum(one.num_prompt for one in answers) / took_s,
        "prompt_tokens": answers[0].num_prompt,
        "cpu_s": meter.cpu_s(begin_s, end_s),
        "cores": meter.cpu_s(begin_s, end_s) / (end_s - begin_s),
        "seconds": end_s - begin_s,
    }


class Bench:
    """A server, and what is sent to it."""

    def __init__(self, server: Server, args: argparse.Namespace, result: Result) -> None:
        self.server, self.args, self.result = server, args, result
        self.num_prompt = 0  # of a chat with a picture
        self._seed = 0

    def pictures(self, count: int) -> list[bytes]:
        """New ones."""
        first, self._seed = self._seed, self._seed + count
        return [png(self.args.side, seed) for seed in range(first, first + count)]

    def warm_up(self) -> None:
        """A few of each kind; says how many tokens a picture is."""
        rng = Random(-1)
        asks = [chat(self.server.model, one, 8) for one in self.pictures(3)]
        asks += [text(self.server.model, rng, TEXT_PROMPT, 8) for _ in range(8)]
        answers = checked(drive(self.server.port, asks, at_once=4))
        self.num_prompt = answers[0].num_prompt

    def round(self, number: int) -> None:
        """Streams of text; beside them pictures, then the control."""
        args, model, rng, port = self.args, self.server.model, Random(number), self.server.port
        chats = [chat(model, image, ANSWER) for image in self.pictures(args.requests)]
        control = [text(model, rng, self.num_prompt, ANSWER) for _ in range(args.requests)]
        # Longer than any round: they are hung up on.
        longest = self.server.context_len() - TEXT_PROMPT - 1
        streams = Streams(port, [text(model, rng, TEXT_PROMPT, longest) for _ in range(args.streams)])
        encoded = self._encoded()
        meter = Meter(self.server)
        steps = Steps(self.server) if args.steps else None
        time.sleep(BEGIN_S + ALONE_S)
        alone_end_s = time.perf_counter()
        seen = checked(drive(port, chats, at_once=len(chats)))
        time.sleep(GAP_S)
        plain = checked(drive(port, control, at_once=len(control)))
        meter_end_s = time.perf_counter()
        texts = streams.stop()
        meter.close()
        encoded = self._encoded() - encoded
        if encoded != args.requests:
            raise SystemExit(f"{args.requests} pictures were sent, and {encoded:g} went through the encoder")
        if not all(one.has_left and one.events_s and one.events_s[-1] > meter_end_s - 5 for one in texts):
            raise SystemExit("a text stream ended, failed or stood still before it was hung up on")
        first_s, begin_s = alone_end_s, alone_end_s - ALONE_S
        times = {"alone": (begin_s, first_s)} | {
            name: (min(one.sent_s for one in those), max(one.events_s[-1] for one in those))
            for name, those in (("pictures", seen), ("control", plain))
        }
        found, other = beside(seen, texts, meter, is_chat=True), beside(plain, texts, meter, is_chat=False)
        alone = gaps(texts, begin_s, first_s) | {"cores": meter.cpu_s(begin_s, first_s) / (first_s - begin_s)}
        for figures in (found, other):
            figures["itl_p99_ratio"] = figures["itl_p99_ms"] / alone["itl_p99_ms"]
        found["itl_p99_to_control"] = found["itl_p99_ms"] / other["itl_p99_ms"]
        found["cpu_ms_per_picture"] = (found["cpu_s"] - other["cpu_s"]) / args.requests * 1e3
        found["megabytes_sent"] = sum(len(one.request) for one in chats) / 1e6
        for name, figures in (("alone", alone), ("pictures", found), ("control", other)):
            self.result.add(name, figures)
            print(f"  {name:9}" + "  ".join(f"{key} {value:.4g}" for key, value in figures.items()), flush=True)
        if steps is not None:
            steps.close()
            for name, (since_s, until_s) in times.items():
                print(f"  {name}", late(texts, since_s, until_s, 1.5 * alone["itl_p99_ms"]), sep="\n    ")
                print("", *steps.told(since_s, until_s), sep="\n    ", flush=True)

    def _encoded(self) -> float:
        return next(value for name, value in self.server.metrics().items() if "encoded_media" in name and "created" not in name)


def checked(answers: list[Answer]) -> list[Answer]:
    """All of them, or the end."""
    if failed := failures(answers):
        raise SystemExit(f"{len(failed)} of {len(answers)} requests failed; the first: {failed[0]}")
    return answers


def main() -> None:
    own, flags = split_arguments(sys.argv[1:])
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--folder", help="a model's folder; its weights are made up")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--side", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--steps", action="store_true", help="also say what steps there were, and how long they took")
    parser.add_argument("--json")
    args = parser.parse_args(own)
    with tempfile.TemporaryDirectory() as made:
        if args.folder is None:
            write_model(Path(made), is_small=args.small)
        folder = args.folder or made
        result = Result("qwen2_5_vl", machine())
        print(shown(result.machine), flush=True)
        server = Server(folder, ["--load-format", "dummy", *flags])
        try:
            print(f"ready after {server.ready_s:.1f} s", flush=True)
            bench = Bench(server, args, result)
            bench.warm_up()
            print(f"a chat with a picture is {bench.num_prompt} tokens", flush=True)
            for number in range(args.rounds):
                bench.round(number)
        finally:
            server.close()
            print("\n".join(server.problems()))
    result.notes["flags"] = flags
    result.save(args.json)


if __name__ == "__main__":
    main()
