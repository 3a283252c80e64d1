"""How calls and free text follow each other in an answer's grammar, for every format alike.

Owns the frame around calls: how many, what stands between, what may stand in their place. The formats give the calls themselves.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from streamserve.text.lark import ANY_TEXT, Grammar, check_part, marked, regex_of, repeated, without
from streamserve.text.tools.format import Demand

# Where nothing but calls may follow, most calls of one answer, unless the request names another number: behind each call a model
# is asked whether it ends or calls again, and a small one may never end.
MAX_CALLS = 16


@dataclass(frozen=True, slots=True)
class Frame:
    """What stands around calls. `before` and `after` enclose all of them, `begin` and `end` each, `between` separates two.

    Texts may hold control tokens; `control` has the ids of those that the vocabulary knows. `before + begin` is what tells a call
    from free text.
    """

    begin: str
    end: str = ""
    between: str = ""
    before: str = ""
    after: str = ""
    control: Mapping[str, int] = field(default_factory=dict)

    def grammar(
        self,
        bodies: Sequence[Grammar],
        demand: Demand,
        trigger: str,
        answer: Grammar | None = None,
        shared: Sequence[str] = (),
    ) -> Grammar:
        """An answer of calls whose insides are `bodies`. When the demand asks for none: free text with calls in it, or one
        answer that `answer` describes in place of all calls. `trigger`: with it, free text ends and a call begins. `shared`:
        rules that several bodies use."""
        rules = [*shared, f"call_body: {' | '.join(f'call_{n}' for n in range(len(bodies)))}"]
        for n, body in enumerate(bodies):
            rules += [f"call_{n}: {body.start}", *body.rules]
        if demand.min_calls or answer is not None:
            low, high = max(1, demand.min_calls), MAX_CALLS if demand.max_calls is None else demand.max_calls
            calls = self._calls(low, max(low, high), "")
            if answer is None or demand.min_calls:
                return Grammar(calls, tuple(rules))
            check_part(answer)
            return Grammar(f"calls | ({answer.start})", (f"calls: {calls}", *rules, *answer.rules))
        return self._in_free_text(demand.max_calls, trigger, rules)

    def _calls(self, low: int, high: int | None, behind: str) -> str:
        """The calls, of whose beginning `behind` is written already."""
        begin, end = marked(self.begin, self.control), marked(self.end, self.control)
        first = marked((self.before + self.begin).removeprefix(behind), self.control)
        more = repeated(
            f"{marked(self.between, self.control)} {begin} call_body {end}", low - 1, None if high is None else high - 1
        )
        return f"{first} call_body {end} {more} {marked(self.after, self.control)}"

    def _in_free_text(self, high: int | None, trigger: str, rules: list[str]) -> Grammar:
        """Any text, and once the trigger is written, a call. Calls in one enclosure follow each other; otherwise text may stand
        between them."""
        if high == 0:
            return self._text_alone(trigger)
        is_group = bool(self.before)
        calls = self._calls(1, high if is_group else 1, trigger)
        times = "?" if high == 1 or (is_group and high is not None) else "*" if high is None else f"{{0,{high}}}"
        if trigger in self.control:
            start = f"(text_part <[{self.control[trigger]}]> calls){times} text_part"
            return Grammar(start, (f"text_part: {ANY_TEXT}", f"calls: {calls}", *rules))
        text = self._text_alone(trigger)
        head = f"text_head[lazy]: /(?s:.*){regex_of(trigger)}/"
        return Grammar(f"(text_head calls){times} {text.start}", (head, *text.rules, f"calls: {calls}", *rules))

    def _text_alone(self, trigger: str) -> Grammar:
        if trigger in self.control:
            return Grammar("text_part", (f"text_part: {ANY_TEXT}",))
        return Grammar("text_tail", ("text_tail: TEXT_TAIL", f"TEXT_TAIL: {without((trigger,))}"))
