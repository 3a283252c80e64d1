"""Edits of texts, as a benchmark's prompts: repeat this, with a change. Fifty of them: 25 texts, each with two changes.

Owns the texts (written for this) and the changes. Knows no model and no server. What is asked for is what people ask of an
assistant with a text at hand: rename, replace a name, a number or a date. The answer should be the text again in large part, and
that is all that the tasks were chosen for.
"""

import difflib
import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Edit:
    """One task. `kind` is the text's: prose, code, data or table."""

    kind: str
    text: str
    change: str

    @property
    def question(self) -> str:
        """What a user would write."""
        return f"{self.change} Repeat the whole text with this change and nothing else.\n\n{self.text}"


def copied_share(text: str, answer: str) -> float:
    """How many of the text's words and signs stand in the answer, in runs of at least four in the text's order; 0 to 1."""
    words, answered = _words(text), _words(answer)
    blocks = difflib.SequenceMatcher(None, words, answered, autojunk=False).get_matching_blocks()
    return sum(block.size for block in blocks if block.size >= 4) / max(1, len(words))


def _words(text: str) -> list[str]:
    """Words and signs: layout may change."""
    return re.findall(r"\w+|[^\w\s]", text)


def edits() -> list[Edit]:
    """All tasks: the first change of every text, then the second."""
    return [Edit(kind, text.strip("\n"), changes[nth]) for nth in range(2) for kind, text, changes in _TEXTS]


_TEXTS: tuple[tuple[str, str, tuple[str, str]], ...] = (
    (
        "prose",
        """
The library on Mill Street opens at nine on Monday and closes at six. On Monday evening there is a reading group for
adults, which meets on the second floor next to the old maps. Children are welcome in the afternoon, when volunteers
read aloud in the small hall. Books can be kept for three weeks, and a loan can be renewed twice by telephone or at the
desk.
""",
        ("Replace Monday by Friday in this text.", "Replace the library by the museum in this text."),
    ),
    (
        "prose",
        """
Dear Mr. Hansen, thank you for your order of 12 March. The two oak chairs left our workshop yesterday and will arrive
within five working days. Please check both chairs when they are delivered and tell the driver about any damage. The
invoice is enclosed; it is due within thirty days. If you have questions about the chairs, call us on any weekday
between eight and four.
""",
        ("Replace the name Hansen by Olsen in this letter.", "In this letter, replace chairs by tables."),
    ),
    (
        "prose",
        """
A glacier forms where more snow falls in winter than melts in summer. Year after year the snow is pressed together until
it becomes ice. When the ice is thick enough it begins to move under its own weight, slowly, often less than a metre a
day. On its way it picks up stones and grinds the rock beneath it. Where the glacier ends, it leaves the stones behind
in long ridges that are called moraines.
""",
        ("Replace the word stones by boulders in this text.", "Replace a metre a day by half a metre a day in this text."),
    ),
    (
        "prose",
        """
To bake the bread, mix five hundred grams of flour with a spoon of salt and a packet of dry yeast. Add three hundred
millilitres of warm water and knead the dough for ten minutes. Let the dough rest under a cloth for one hour. Shape the
dough into a loaf, let it rest again for half an hour, and bake it for forty minutes at two hundred and twenty degrees.
Let the loaf cool before you cut it.
""",
        ("In this recipe, replace dough by batter.", "In this recipe, change forty minutes to fifty minutes."),
    ),
    (
        "prose",
        """
Meeting of the garden committee, Tuesday. Present were Anna, Boris, Chandra and Dmitri. Anna reported that the new fence
is finished and that it cost less than was planned. Boris will order seeds for the spring before the end of the month.
Chandra asked for a second water tap near the greenhouse; the committee agreed. Dmitri will ask the town for permission.
The next meeting is on the first Tuesday in May.
""",
        ("Replace Boris by Bella in these minutes.", "Replace Tuesday by Thursday in these minutes."),
    ),
    (
        "prose",
        """
The train to Lyon leaves from platform four at half past seven. Passengers with bicycles use the last carriage. The
dining car is in the middle of the train and serves breakfast until ten. Between Dijon and Lyon the train runs along the
river, and the best view is on the left side. The train arrives in Lyon at a quarter to twelve, where there are trams to
the airport every ten minutes.
""",
        ("Replace Lyon by Geneva in this text.", "Replace platform four by platform nine in this text."),
    ),
    (
        "prose",
        """
Our washing machine must stand on a firm and level floor. Before the first wash, remove the four transport bolts from
the back of the machine and keep them. Connect the hose to the cold water tap and turn the tap on slowly. Close the door
of the machine, choose a programme, and press the start button. If water is found under the machine, turn off the tap,
pull the plug and call the service.
""",
        ("In this manual, replace washing machine by dishwasher.", "In this manual, replace four transport bolts by six bolts."),
    ),
    (
        "prose",
        """
Good morning everybody. The new version of our program is ready, and it will be installed on Wednesday night. The
servers will not be available between ten and eleven. Please save your work before ten and log out. After the update you
have to log in again with your old password. The new version starts faster, and the search now finds attachments as
well. Thank you for your patience.
""",
        ("Replace Wednesday by Saturday in this message.", "In this message, replace password by PIN."),
    ),
    (
        "code",
        """
def read_scores(path):
    scores = {}
    with open(path) as lines:
        for line in lines:
            name, value = line.strip().split(",")
            scores[name] = int(value)
    return scores


def best_name(path):
    scores = read_scores(path)
    best = None
    for name in scores:
        if best is None or scores[name] > scores[best]:
            best = name
    return best
""",
        ("Rename the variable scores to points in this code.", "Rename the function read_scores to load_scores in this code."),
    ),
    (
        "code",
        """
class Account:
    def __init__(self, owner, balance=0):
        self.owner = owner
        self.balance = balance

    def deposit(self, amount):
        if amount <= 0:
            raise ValueError("amount must be positive")
        self.balance += amount
        return self.balance

    def withdraw(self, amount):
        if amount > self.balance:
            raise ValueError("not enough money")
        self.balance -= amount
        return self.balance
""",
        ("Rename the class Account to Wallet in this code.", "Add the type hint float to every amount in this code."),
    ),
    (
        "code",
        """
function totalPrice(items, taxRate) {
  let total = 0;
  for (const item of items) {
    const price = item.price * item.quantity;
    total += price;
  }
  return total * (1 + taxRate);
}

function printReceipt(items, taxRate) {
  for (const item of items) {
    console.log(item.name, item.price, item.quantity);
  }
  console.log("Total", totalPrice(items, taxRate));
}
""",
        ("Rename taxRate to vatRate in this code.", "Change console.log to console.info in this code."),
    ),
    (
        "code",
        """
import math


def area_of_circle(radius):
    return math.pi * radius * radius


def area_of_rectangle(width, height):
    return width * height


def area_of_triangle(a, b, c):
    half = (a + b + c) / 2
    return math.sqrt(half * (half - a) * (half - b) * (half - c))


print(area_of_circle(2.0))
print(area_of_rectangle(3.0, 4.0))
print(area_of_triangle(3.0, 4.0, 5.0))
""",
        ("Rename the variable half to s in this code.", "Rename the parameter radius to r in this code."),
    ),
    (
        "code",
        """
SELECT customers.name, orders.id, orders.total
FROM customers
JOIN orders ON orders.customer_id = customers.id
WHERE orders.total > 100
  AND orders.created_at >= '2024-01-01'
  AND customers.country = 'Norway'
ORDER BY orders.total DESC
LIMIT 20;
""",
        ("Replace Norway by Finland in this query.", "Change the limit from 20 to 50 in this query."),
    ),
    (
        "code",
        """
def count_words(text):
    counts = {}
    for word in text.lower().split():
        word = word.strip(".,;:!?")
        if word:
            counts[word] = counts.get(word, 0) + 1
    return counts


def most_common(text, limit):
    counts = count_words(text)
    ordered = sorted(counts.items(), key=lambda item: item[1], reverse=True)
    return ordered[:limit]
""",
        ("Rename counts to frequencies in this code.", "Add a docstring to each function in this code."),
    ),
    (
        "code",
        """
#include <stdio.h>

int gcd(int a, int b) {
    while (b != 0) {
        int rest = a % b;
        a = b;
        b = rest;
    }
    return a;
}

int main(void) {
    printf("%d\\n", gcd(12, 18));
    printf("%d\\n", gcd(35, 64));
    printf("%d\\n", gcd(100, 75));
    return 0;
}
""",
        ("Rename the variable rest to remainder in this code.", "Change int to long in the function gcd of this code."),
    ),
    (
        "code",
        """
server {
    listen 80;
    server_name example.com www.example.com;
    root /var/www/example;

    location / {
        try_files $uri $uri/ =404;
    }

    location /api/ {
        proxy_pass http://127.0.0.1:8000;
        proxy_set_header Host $host;
        proxy_read_timeout 60s;
    }
}
""",
        ("Change the port 8000 to 9000 in this configuration.", "Replace example.com by example.org in this configuration."),
    ),
    (
        "data",
        """
{
  "id": 4711,
  "name": "Desk lamp",
  "price": 39.5,
  "currency": "EUR",
  "in_stock": true,
  "colors": ["black", "white", "green"],
  "size": {"width": 20, "height": 45, "depth": 18},
  "supplier": {"name": "Lumen", "city": "Turin", "country": "IT"}
}
""",
        ("Change the price to 42.0 in this JSON.", "Change the supplier's city to Milan in this JSON."),
    ),
    (
        "data",
        """
[
  {"name": "Alice", "age": 34, "city": "Berlin", "active": true},
  {"name": "Bob", "age": 41, "city": "Paris", "active": true},
  {"name": "Carla", "age": 29, "city": "Madrid", "active": true},
  {"name": "David", "age": 52, "city": "Vienna", "active": true},
  {"name": "Elena", "age": 37, "city": "Athens", "active": true}
]
""",
        ("Set active to false for everybody in this JSON.", "Rename the key city to town in this JSON."),
    ),
    (
        "data",
        """
name: nightly-backup
schedule: "0 3 * * *"
source:
  host: db.internal
  port: 5432
  database: orders
target:
  bucket: backups
  prefix: orders/nightly
  keep_days: 30
notify:
  email: admin@example.com
  on_failure: true
  on_success: false
""",
        ("Change keep_days to 90 in this YAML.", "Replace orders by invoices in this YAML."),
    ),
    (
        "data",
        """
{
  "openapi": "3.1.0",
  "info": {"title": "Weather", "version": "1.0.0"},
  "paths": {
    "/forecast": {
      "get": {
        "summary": "Forecast for a city",
        "parameters": [
          {"name": "city", "in": "query", "required": true, "schema": {"type": "string"}},
          {"name": "days", "in": "query", "required": false, "schema": {"type": "integer"}}
        ]
      }
    }
  }
}
""",
        ("Change the version to 2.0.0 in this JSON.", "Rename the parameter days to hours in this JSON."),
    ),
    (
        "data",
        """
[package]
name = "harbour"
version = "0.3.1"
description = "Plans which ship goes to which quay"
license = "MIT"

[dependencies]
serde = "1.0"
tokio = "1.38"
chrono = "0.4"
regex = "1.10"

[profile.release]
opt-level = 3
lto = true
""",
        ("Change the version from 0.3.1 to 0.4.0 in this file.", "Rename the package harbour to seaport in this file."),
    ),
    (
        "table",
        """
| City   | Country | Inhabitants | River   |
|--------|---------|-------------|---------|
| Vienna | Austria | 1,900,000   | Danube  |
| Prague | Czechia | 1,300,000   | Vltava  |
| Paris  | France  | 2,100,000   | Seine   |
| Rome   | Italy   | 2,800,000   | Tiber   |
| London | England | 8,900,000   | Thames  |
| Warsaw | Poland  | 1,800,000   | Vistula |
""",
        ("Rename the column Inhabitants to Population in this table.", "In this table, replace England by United Kingdom."),
    ),
    (
        "table",
        """
date,product,amount,price
2024-05-01,apples,120,0.40
2024-05-01,pears,80,0.55
2024-05-02,apples,95,0.40
2024-05-02,plums,60,0.30
2024-05-03,apples,110,0.42
2024-05-03,pears,70,0.55
2024-05-04,plums,85,0.28
2024-05-04,apples,130,0.42
""",
        ("Replace pears by peaches in this table.", "Change the year 2024 to 2025 in this table."),
    ),
    (
        "table",
        """
1. Open the settings and choose Network.
2. Turn off the wireless connection.
3. Plug the cable into the router and into the computer.
4. Wait until the green light stops blinking.
5. Choose Wired connection in the settings.
6. Open a page in the browser to test the connection.
7. If no page opens, restart the router and wait two minutes.
""",
        ("Replace the word router by modem in this list.", "Replace two minutes by five minutes in this list."),
    ),
    (
        "table",
        """
- Mathematics: Monday 9:00, room 12, Mrs. Keller
- Physics: Monday 11:00, room 14, Mr. Novak
- History: Tuesday 9:00, room 3, Mrs. Lind
- Chemistry: Wednesday 10:00, room 14, Mr. Novak
- Geography: Thursday 9:00, room 5, Mrs. Lind
- Music: Thursday 13:00, hall, Mr. Ferrari
- Sports: Friday 8:00, gym, Mrs. Keller
""",
        ("Replace Mr. Novak by Mr. Costa in this list.", "Replace room 14 by room 21 in this list."),
    ),
)
