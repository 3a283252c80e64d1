"""A batch of questions behind the same examples: the examples are read once, and the questions are answered together."""

import streamserve as sgl

COUNTRIES = (
    "France",
    "Germany",
    "Japan",
    "Egypt",
    "Poland",
    "Greece",
    "Russia",
    "China",
    "Austria",
    "Kenya",
    "Cuba",
    "Norway",
    "Chile",
)


@sgl.function
def capital(s, country):
    s += "Countries and their capitals.\n\n"
    s += "Country: Spain\nCapital: Madrid\n\n"
    s += "Country: Italy\nCapital: Rome\n\n"
    s += "Country: Portugal\nCapital: Lisbon\n\n"
    s += f"Country: {country}\nCapital:" + sgl.gen("capital", stop="\n", max_tokens=8)


if __name__ == "__main__":
    with sgl.Engine() as engine:
        sgl.set_default_backend(engine)
        states = capital.run_batch([{"country": country} for country in COUNTRIES], temperature=0, progress_bar=True)
        for country, state in zip(COUNTRIES, states, strict=True):
            print(f"{country:10} {state['capital'].strip()}")
        infos = [state.get_meta_info("capital") for state in states]
        read, cached = sum(info["prompt_tokens"] for info in infos), sum(info["cached_tokens"] for info in infos)
        print(f"{cached} of {read} prompt tokens came from the cache")
