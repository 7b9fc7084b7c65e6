"""The word lists and sentence patterns of the generated documents. Data only; all of it written for this project.

A pattern is text with fields in braces. In every statement the value comes after the attribute and the service, because a causal
model can bind a value only to what it has already read.
"""


def _words(text: str) -> list[str]:
    return text.split()


FIRST_PARTS = _words("""
    Amber Ash Azure Birch Black Blue Bold Brass Calm Cedar Chalk Clay Clear Cloud Coal Cobalt Copper Coral Crisp
    Dawn Deep Delta Dune Dusk East Ember Fern Fire Flint Frost Gold Grand Gray Green Hazel High Indigo Iron Ivory
    Jade Keen Lake Lemon Light Lime Linen Lunar Maple Mint Misty North Oak Olive Onyx Opal Pearl Pine Plum Polar
    Quiet Red River Rose Ruby
""")
SECOND_PARTS = _words("""
    Adder Badger Bat Bear Beaver Bison Boar Bull Camel Cat Cobra Condor Cougar Crane Crow Deer Dog Dove Duck Eagle
    Eel Elk Emu Falcon Ferret Finch Fox Frog Gecko Goat Goose Gull Hare Hawk Heron Horse Ibis Jay Kite Koala Lark
    Lion Lizard Lynx Mole Moose Moth Mouse Newt Otter Owl Panda Parrot Puma Quail Rabbit Raven Robin Salmon Seal
    Shark Snake Spider Swan
""")
FIRST_NAMES = _words("""
    Ada Alan Alma Amir Anna Ben Carl Clara Dana David Elena Emil Erik Fatima Grace Hana Hugo Ines Ivan James Jana
    Kofi Lena Luis Maria Mei Nadia Omar Paul Rosa Sara Tom
""")
LAST_NAMES = _words("""
    Adams Baker Bauer Berg Chen Costa Cruz Diaz Dubois Evans Fischer Garcia Haas Hansen Ito Jensen Khan Kim Klein
    Lopez Meyer Mori Novak Okafor Park Patel Rossi Silva Singh Sato Weber Young
""")
CITIES = _words("""
    Athens Berlin Bern Boston Cairo Chicago Dakar Delhi Dublin Geneva Hanoi Kyoto Lagos Lima Lisbon London Madrid
    Milan Nairobi Osaka Oslo Paris Porto Prague Quito Riga Rome Seoul Sofia Tokyo Turin Vienna
""")
MONTHS = _words("""
    January February March April May June July August September October November December
""")
CODE_LETTERS = _words("""
    B C D F G H J K L M N P Q R S T V W X Z
""")

# Every attribute has one kind of value.
ATTRIBUTES = {
    "number": _words(
        "port quota limit budget weight timeout capacity depth width count rate size level ceiling"
    ),
    "code": _words("ticket badge token serial zone rack"),
    "person": _words("owner lead author tester"),
    "city": _words("site region office depot"),
    "date": _words("launch audit expiry renewal"),
}

STATEMENTS = (
    "The {attribute} of {service} is {value}.",
    "The {attribute} of {service} was set to {value}.",
    "For {service}, the {attribute} is {value}.",
    "In {service}, the {attribute} is now {value}.",
    "The {attribute} that {service} uses is {value}.",
    "As agreed, the {attribute} of {service} is {value}.",
    "Note that {service} has the {attribute} {value}.",
    "The plan gives {service} the {attribute} {value}.",
    "{service} keeps its {attribute} at {value}.",
    "{service} runs with the {attribute} {value}.",
)
QUESTIONS = (
    "What is the {attribute} of {service}?",
    "Which {attribute} does {service} have?",
    "Tell me the {attribute} of {service}.",
    "Please give me the {attribute} of {service}.",
    "What {attribute} was set for {service}?",
    "Can you find the {attribute} of {service}?",
    "I need to know the {attribute} of {service}.",
    "What does the document say about the {attribute} of {service}?",
)
DOUBLE_QUESTIONS = (
    "What are the {attribute} and the {attribute2} of {service}?",
    "Tell me the {attribute} and the {attribute2} of {service}.",
)
ANSWER = "The {attribute} of {service} is {value}."
DOUBLE_ANSWER = "The {attribute} of {service} is {value} and the {attribute2} is {value2}."
ABSENT_ANSWER = "The document does not say."

GREETINGS = (
    "Hello!",
    "Hi",
    "Hi there!",
    "Hello, who are you?",
    "Good morning!",
    "Hey!",
    "What can you do?",
    "Help",
    "Thanks!",
)
REQUESTS = (
    "Write a poem on the {noun} and the {noun2}.",
    "What do you think of the {noun}?",
    "Please {verb} the {noun}.",
    "Can you {verb} the {noun} for me?",
    "Why does the {noun} {verb} the {noun2}?",
)
HELP_ANSWER = (
    "I answer questions about the services in a document, such as: What is the port of Amber Falcon?"
)

TITLE = "# Service specification"
SECTION = "\n\n## Section {number}\n\nThese notes are part of the specification."

FILLERS = (
    "The {adjective} {noun} must {verb} every {noun2} before the {noun3} starts.",
    "The {noun} may {verb} the {noun2} only when the {noun3} is {adjective}.",
    "When the {noun} is {adjective}, the team will {verb} the {noun2}.",
    "Each {noun} has one {adjective} {noun2} and one {noun3}.",
    "Do not {verb} the {noun} while the {noun2} is open.",
    "The team can {verb} the {adjective} {noun} in {number} hours.",
    "After {number} days the {noun} is {adjective} and the {noun2} can close.",
    "See the {noun} for the {adjective} view of the {noun2}.",
    "The {noun} of {service} is {adjective}.",
    "The team of {service} will {verb} the {noun}.",
    "{service} depends on the {noun}.",
    "The {attribute} of the {noun} is not fixed.",
    "Every {noun} needs some {attribute}, and the {noun2} may {verb} it.",
)
NOUNS = _words("""
    alert batch bucket cache change check cluster code config copy data day disk door error event file flag form
    gate group guide host index item job key line link list load log loop map message mode model network node note
    order page path plan pool query queue record report request route rule run script server set shard sign step
    store stream table task test thread time tool trace user view wall week worker
""")
VERBS = _words("""
    add answer build call check clean close copy count drain drop fetch fill find fix hold keep load lock log mark
    merge move open pause poll read repair reset restart route run scan send serve show sign sort split start stop
    store sync test trim update wait watch write
""")
ADJECTIVES = _words("""
    active big clean cold common dark dense dry early empty fast final first flat free fresh full good hot idle
    large last late local long loose main narrow new next old open plain primary rare ready remote safe second
    shared short simple slow small spare stable strict strong tall thin tight warm wide
""")


def values(kind: str) -> list[str]:
    """Every value of this kind."""
    if kind == "number":
        return [str(number) for number in range(100, 10_000)]
    if kind == "code":
        pairs = [first + second for first in CODE_LETTERS for second in CODE_LETTERS]
        return [f"{pair}-{number}" for pair in pairs for number in range(10, 100)]
    if kind == "person":
        return [f"{first} {last}" for first in FIRST_NAMES for last in LAST_NAMES]
    if kind == "city":
        return CITIES
    return [f"{day} {month} {year}" for day in range(1, 29) for month in MONTHS for year in range(2020, 2040)]
