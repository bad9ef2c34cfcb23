"""English word lists for `sentence_parser`: closed classes in full, of the open ones what captions need.

A word that is in no list is taken for a noun unless its ending or its place says otherwise, so the lists
hold verbs, adjectives and adverbs, and of the nouns only those that look like one of these.
"""

from __future__ import annotations

from functools import cache

__all__ = [
    "ADJECTIVES",
    "ADVERBS",
    "ARTICLES",
    "AUXILIARIES",
    "BE",
    "CATENATIVES",
    "CAUSATIVES",
    "COLLECTIVES",
    "COMPLEX_PREPOSITIONS",
    "COMPOUNDS",
    "COMPOUND_TAILS",
    "CONJUNCTIONS",
    "COPULAS",
    "DEFINITE",
    "HAVE",
    "HOLDERS",
    "INSTRUMENTS",
    "MOTION",
    "NOT_VERBAL",
    "NOUN_OR_VERB",
    "NUMERALS",
    "PARTICLES",
    "PLURALS",
    "POSSESSIVES",
    "POSTNOMINAL",
    "POSTURES",
    "PREPOSITIONS",
    "PRONOUNS",
    "QUESTIONS",
    "RELATIVES",
    "SUBORDINATORS",
    "UNCHANGED",
    "agree",
    "animate",
    "verb_forms",
]


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


ARTICLES = _words(
    "a an the this these those some any each every both all no many much few most half several multiple"
    " numerous either neither such"
)
DEFINITE = _words("the this that these those")
POSSESSIVES = _words("my your his her its our their whose")
NUMERALS = _words(
    "one two three four five six seven eight nine ten eleven twelve thirteen fifteen twenty thirty forty"
    " fifty hundred thousand dozen single more fewer less another other second third"
)
# Each form -> the form that names the entity where nothing before it can be meant.
PRONOUNS = {w: w for w in ("i", "you", "he", "she", "it", "we", "they")} | {
    "me": "i", "him": "he", "her": "she", "us": "we", "them": "they", "himself": "he", "herself": "she",
    "itself": "it", "themselves": "they", "myself": "i", "yourself": "you", "ourselves": "we",
}  # fmt: skip
RELATIVES = _words("who whom which that")
QUESTIONS = _words("what where why how when")
CONJUNCTIONS = _words("and or but nor")
SUBORDINATORS = _words("while as when because since whereas although though if before after until so where")

HAVE = _words("has have had having 've")
BE = _words("is are was were be been being am 's 're 'm isn't aren't wasn't weren't")
AUXILIARIES = (
    BE
    | HAVE
    | _words(
        "do does did will would shall should can could may might must cannot not n't never"
        " don't doesn't didn't can't won't couldn't hasn't haven't hadn't wouldn't"
    )
)
COPULAS = _words("look seem appear feel become get remain stay smell taste sound")
# Verbs that only introduce another: "begins to climb" is "climb".
CATENATIVES = _words(
    "try begin start want attempt prepare appear seem continue need like love go about going ready keep"
    " stop decide learn"
)
# Verbs whose object may have a verb of its own without "to": "helps a child climb".
CAUSATIVES = _words("help watch see let make hear feel have ask tell teach allow")
# Verbs that take a second verb as what is done meanwhile: "stands reading books".
POSTURES = _words("sit stand lie kneel walk crouch squat lean run go hang stay remain")

PREPOSITIONS = _words(
    "aboard about above across after against along alongside amid among amongst around at atop before"
    " behind below beneath beside besides between beyond by down during for from in inside into like near"
    " of off on onto out outside over past per than through throughout to toward towards under underneath"
    " up upon via with within without"
)
# Longest first where one begins another; each is matched as a run of words.
COMPLEX_PREPOSITIONS = tuple(
    tuple(text.split())
    for text in (
        "to the left of", "to the right of", "on the left of", "on the right of", "on the left side of",
        "on the right side of", "in the middle of", "in the center of", "in the centre of", "on the back of",
        "in the back of", "at the top of", "at the bottom of", "on the edge of", "at the edge of",
        "on the side of", "by the side of", "on the other side of", "in front of", "on top of", "next to",
        "close to", "out of", "away from", "because of", "instead of", "ahead of", "inside of", "outside of",
        "along with", "together with", "adjacent to", "such as", "up to", "in between", "left of", "right of",
        "opposite of", "opposite to", "on board of", "far from", "full of", "made of", "in back of",
    )
)  # fmt: skip
PARTICLES = _words("up down off on out away over back in together apart around along by through forward")
# Prepositions of motion belong to the verb even after its object: "throws a ball to a dog".
MOTION = _words("to into onto toward towards from through across at past for over around along down up")
INSTRUMENTS = _words(
    "axe bat beak broom brush camera chopsticks cloth club feet finger fingers foot fork hammer hand"
    " hands hose key kick knife ladle leg legs mallet mop mouth needle net paddle pen pencil phone racket"
    " rake rod rope saw scissors shovel spatula sponge spoon stick straw sword teeth tool towel trunk whip"
)
# With these verbs "with" tells what the object has: "holds a cup with a straw".
HOLDERS = _words("hold carry wear have own buy eat drink see")
ADVERBS = _words(
    "abroad afar again ahead almost alone already also always apart as aside away backward backwards both"
    " downstairs downwards either else even ever everywhere fast forwards hard here high home indoors"
    " inside instead just later low maybe mid-air nearby nearly now often once only outdoors outside"
    " overhead perhaps please quite rather really sideways slightly so sometimes somewhere soon still then"
    " there today together too twice upright upside upstairs upwards usually very well yet"
)

ADJECTIVES = _words(
    "adult afraid african alive alone american ancient angry asian asleep awake back bad baggy bald bare"
    " barefoot bearded beautiful beige big black blind blonde blue blunt bored bottom brave brick bright"
    " broken bronze brown bushy busy calm cardboard careful casual central ceramic checkered cheerful"
    " chinese chubby circular clean clear closed cloudless cloudy cold colorful colorless colossal"
    " colourful concrete cool cotton cozy creamy crisp crowded crunchy curly curved cute dark dead deep"
    " delicious denim dense different digital dim dirty distant dotted dry dusty elderly electric elegant"
    " empty english enormous european excited fake famous fancy fat female fierce flat floral fluffy foamy"
    " foggy foreign formal free french fresh friendly front frothy frozen full funny furry fuzzy gentle"
    " german giant glass gold golden good grassy gray greasy great green grey hairy handsome happy hard"
    " healthy heavy high hilly hot huge hungry icy indian indoor inflatable inner iron italian japanese"
    " large lazy leafy leather left light little lone long loud lovely low lower lush main male marble"
    " maroon massive messy metal mexican middle middle-aged mini miniature modern muddy multi-colored"
    " multicolored naked narrow navy nearby neat new nice odd old open orange outdoor outer oval oversized"
    " own pale paper patterned pink plaid plain plastic playful pointy poor pregnant pretty proud public"
    " purple quiet rainy rapid raw ready real rectangular red remote rich right ripe rocky rotten rough"
    " round rubber rural rusty sad same sandy scared serious shaggy shallow sharp shiny shirtless short"
    " sick silk silly silver similar skimpy skinny sleepy slim small smooth snowy soft solo sour spanish"
    " sparse spicy spiral spotted square steamy steel steep still stone stormy straight strange straw"
    " stray striped strong sturdy sunny sweet swift tall tame tan tasty teal teenage thick thin thirsty"
    " tiny tired top toy transparent treeless tropical turquoise ugly upper upset urban various vast"
    " violet warm wavy weak wealthy weird wet white whole wide wild windy wooden woolen woollen yellow"
    " young"
)

# Adjectives that may follow their noun.
POSTNOMINAL = _words("alone asleep awake alive barefoot naked shirtless open closed empty ready dead upright")
# Names that begin with an adjective.
COMPOUNDS = {
    first: _words(rest)
    for first, rest in {
        "hard": "hat hats", "close": "up ups", "paper": "towel towels bag bags",
        "hot": "dog dogs air tub", "high": "chair chairs school heels heel", "french": "fries",
        "soft": "drink drinks", "fast": "food", "green": "beans", "blue": "jay", "white": "board",
        "black": "board",
        "short": "sleeves", "dry": "cleaner", "light": "bulb bulbs house pole", "orange": "juice",
        "front": "yard", "still": "life", "stuffed": "animal animals", "mashed": "potatoes",
        "grilled": "cheese", "full": "moon", "rolling": "pin", "flying": "saucer disc", "stained": "glass",
    }.items()
}  # fmt: skip

# Regular verbs by their base form; whatever is also a common noun or adjective stands in NOUN_OR_VERB too.
_REGULAR = _words(
    "add adjust admire aim answer appear applaud approach argue arrange arrive ask assemble attach attack"
    " attempt bake balance bark bat bathe beg belong bless block board bounce bow bowl box browse brush"
    " bump bury call camp capture caress carry carve cast celebrate chain change chase chat check cheer"
    " chew chop clap clean climb close collect color comb compete connect consume continue converse cook"
    " count cover crack cradle crane crash crawl crochet cross crouch crowd cry cuddle cycle dance"
    " decorate deliver descend dip direct discuss display dive dock dodge doze drag dress dribble drip"
    " drool drop dry dust embrace empty enjoy enter examine exchange exercise explore face fasten file"
    " fill film finish fish fix flap flip float flow fold follow gallop gather gaze gesture glide glow"
    " grab graze greet grill grip groom guard guide hammer hand handle harvest help hike hitch hop hover"
    " howl huddle hug hunt hurdle hurry illuminate inflate inspect iron jog join juggle jump kick kill"
    " kiss knead knock label land laugh launch lean lick lift light like line listen load lock look loom"
    " lounge love lower march mark measure milk mix mop mount move mow nap need nurse observe offer open"
    " operate order overlook pack paddle paint park pass pat pause pedal peek peel perch perform pet"
    " photograph pick pile pitch place plant play point polish pose pounce pour practice practise pray"
    " prepare present press print produce protect pull pump punch push race rain raise rake reach record"
    " reflect relax release remain remove repair rescue rest return roam roast roll row rub rush sail"
    " salute scale scatter scoop scratch scream scrub seat seem serve sew shave shop shout shovel shower"
    " sign sip skate skateboard sketch ski skip slam sled slice smash smell smile smoke sniff snow"
    " snowboard snuggle soak soar spill splash spot spray sprinkle squat squeeze squirt stack stare start"
    " stay steer step stir stop strain stretch stroke stroll strum study stuff surf surround tackle talk"
    " tap taste text tickle tie tip toast toil topple toss touch tour tow trade trail train trample"
    " transform transport travel trim trot try tug tumble turn twirl twist type unload unwrap use vacuum"
    " vend visit wade wag wait walk wander want wash watch water wave weigh welcome weld wheel whip whisk"
    " whisper whistle wipe work wrap wrestle yawn yell zip zoom"
)
# Base, past, participle.
_IRREGULAR = """
be was been, bear bore borne, beat beat beaten, become became become, begin began begun, bend bent bent,
bite bit bitten, blow blew blown, break broke broken, bring brought brought, build built built,
burn burnt burnt, buy bought bought, catch caught caught, choose chose chosen, come came come,
creep crept crept, cut cut cut, deal dealt dealt, dig dug dug, do did done, draw drew drawn,
drink drank drunk, drive drove driven, eat ate eaten, fall fell fallen, feed fed fed, feel felt felt,
fight fought fought, find found found, fly flew flown, freeze froze frozen, get got got, give gave given,
go went gone, grind ground ground, grow grew grown, hang hung hung, have had had, hear heard heard,
hide hid hidden, hit hit hit, hold held held, hurt hurt hurt, keep kept kept, kneel knelt knelt,
know knew known, lay laid laid, lead led led, leap leapt leapt, leave left left, lend lent lent,
let let let, lie lay lain, lose lost lost, make made made, meet met met, pay paid paid, put put put,
read read read, ride rode ridden, ring rang rung, rise rose risen, run ran run, say said said, see saw seen,
seek sought sought, sell sold sold, send sent sent, set set set, shake shook shaken, shine shone shone,
shoot shot shot, show showed shown, shut shut shut, sing sang sung, sink sank sunk, sit sat sat,
sleep slept slept, slide slid slid, speak spoke spoken, spend spent spent, spin spun spun, spit spat spat,
split split split, spread spread spread, spring sprang sprung, stand stood stood, steal stole stolen,
stick stuck stuck, sting stung stung, strike struck struck, string strung strung, sweep swept swept,
swim swam swum, swing swung swung, take took taken, teach taught taught, tear tore torn, tell told told,
think thought thought, throw threw thrown, wake woke woken, wear wore worn, weave wove woven, win won won,
wind wound wound, write wrote written
"""
_DOUBLING = _words(
    "bat beg begin chat chop clap cut dig dip drag drip drop flap flip get grab grin grip hit hop hug jog"
    " knit label lap let mop nap nod pat pedal pet pin plan put rub run scrub set shop shut sip sit skip"
    " slam sled slip snap spin spit split spot squat step stir stop strum swim tan tap tip travel trim"
    " trot tug wag whip win wrap zip"
)

# Base or -s forms that are at least as often nouns: only a place where a verb is due makes them verbs.
NOUN_OR_VERB = _words(
    "bark bat bear bend bite block board bow bowl box break brush burn camp cast chain change check color"
    " comb cook count cover crane creep cross crowd cut cycle dance deal dock dress drink drip drive drop"
    " duck dust exercise face fall fight file film fish fly grill ground guard guide hammer hand hide hike"
    " hit hug hunt iron jump kick kiss kneel land laugh lead leaf leave left lie light line load lock look"
    " lounge love march mark measure milk mix mop mount nap nurse order pack paddle paint park pass pedal"
    " pet photograph pile pitch place plant play point pose present press print produce pump punch race"
    " rain rake record rest ride ring rock roll row run sail saw scale scoop seat set shake shave shop"
    " shot show shower sign sink skate skateboard sketch ski sled sleep slice slide smell smile smoke snow"
    " snowboard spot spray spring stack stand step stick string stroke study stuff surf swing talk tap"
    " taste tear text tie tip toast tour tow trade trail train transport travel turn type vacuum visit"
    " wait walk wash watch water wave wear wheel whip whistle wind work wrap zip"
)
# Nouns in -ing, -ed, -s, -ly or like a past form, which are never read as verbs or adverbs.
NOT_VERBAL = _words(
    "ally anything assembly awning bed beds belly bread building buildings bully bus butterfly ceiling"
    " ceilings class clothing crossing darling drawing drawings dress duckling earring earrings evening"
    " everything family feed field frosting glass grass ground hay head hotdog hundred icing jelly kid"
    " kids king left lightning lily mattress monopoly morning naked nothing orange paddling painting"
    " paintings pudding railing railings rally red reed ring rose saw seed shed shield sibling siblings"
    " sled sling something speed spring stocking stockings string thing things thread wedding weed wing"
    " wings wound"
)
COMPOUND_TAILS = _words(
    "alley bag bags board boards boat boats cap car cart carts center chair chairs desk gear glasses"
    " glove gloves goggles hole iron lane lot lots machine machines mall meter pan pans pole poles pool"
    " pools ring rink rod rods room rooms shoes sign station stick sticks suit suits table tower track"
    " trail trunks wall"
)
COLLECTIVES = _words(
    "bag bags basket baskets block body bottle bottles bouquet bowl bowls box boxes bucket bunch can"
    " cloud couple crowd cup cups flock glass glasses group groups herd kind line loaf lot lots number"
    " pack pair pairs patch piece pieces pile piles plate plates row rows school set sheet slice slices"
    " stack stacks swarm team type variety"
)
PLURALS = _words(
    "people men women children kids sheep deer fish police geese mice feet teeth cattle oxen firemen"
    " policemen snowmen businessmen women's they we you i both twins others"
)
_ANIMATE = _words(
    "adult animal ant ape artist athlete audience baby bear bee bird boy bride brother bull bunny"
    " butterfly calf camel cat chef chicken child children clown cook couple cow cowboy crowd cyclist dad"
    " daughter deer dentist dog dolphin donkey dragon duck duckling eagle elephant everyone family father"
    " female fireman fish foal fox friend frog gentleman giraffe girl goat goose gorilla grandfather"
    " grandma grandmother grandpa groom group guitarist guy he hen horse i infant kangaroo kid king kitten"
    " koala lady lamb leopard lion lizard llama male man men mom monk monkey monster mother mouse nobody"
    " nun nurse officer owl panda parent parrot penguin people person pig pigeon pilot police policeman"
    " pony prince princess puppy queen rabbit rat referee robot rooster scientist seagull seal shark she"
    " sheep sister snake soldier somebody someone son spider squirrel student swan team teen teenager they"
    " tiger toddler tourist turtle twin we whale wolf woman women you zebra"
)
_NOT_PEOPLE = _words(
    "amber anchor armor banner beer blender border boulder bumper burger butter center chapter cleaner"
    " color computer container cooler copper corner counter cover cracker decor deer diaper dinner door"
    " dryer elevator escalator feather finger floor flower folder freezer gutter hammer harbor heater"
    " helicopter holder ladder layer leather letter lighter locker lumber marker mirror mixer motor number"
    " over paper pier planter platter poster printer projector quarter refrigerator river roller rubber"
    " ruler saucer scooter sensor shoulder shower shutter silver skyscraper slipper sofa speaker stroller"
    " summer super sweater tailor timber toaster tower tractor trailer under water weather winter wrapper"
)


def _irregular() -> list[list[str]]:
    return [verb.split() for verb in _IRREGULAR.split(",")]


def _unchanged() -> frozenset[str]:
    return frozenset(base for base, _, participle in _irregular() if base == participle)


# Verbs whose participle is their base form: "is cut".
UNCHANGED = _unchanged()


def _conjugate(base: str) -> dict[str, str]:
    """The forms of a regular verb: `{form: kind}` with kinds base, s, ing, ed."""
    sibilant = base.endswith(("s", "sh", "ch", "x", "z", "o"))
    y = base.endswith("y") and base[-2] not in "aeiou"
    stem = base + base[-1] if base in _DOUBLING else base
    silent = base.endswith("e") and not base.endswith(("ee", "oe", "ye"))
    lie = base.endswith("ie")
    return {
        (base[:-1] + "ies" if y else base + ("es" if sibilant else "s")): "s",
        (base[:-2] + "ying" if lie else (base[:-1] if silent else stem) + "ing"): "ing",
        (base[:-1] + "ied" if y else base + "d" if base.endswith("e") else stem + "ed"): "ed",
        base: "base",
    }


@cache
def verb_forms() -> dict[str, tuple[str, str]]:
    """Every known verb form -> (base form, kind), kind one of base, s, ing, ed (past and participle)."""
    forms: dict[str, tuple[str, str]] = {}
    for base in sorted(_REGULAR):
        forms |= {form: (base, kind) for form, kind in _conjugate(base).items()}
    for base, past, participle in _irregular():
        regular = {form: (base, kind) for form, kind in _conjugate(base).items() if kind != "ed"}
        forms |= {past: (base, "ed"), participle: (base, "ed")} | regular
    return forms | {
        "lying": ("lie", "ing"),
        "dying": ("die", "ing"),
        "lit": ("light", "ed"),
        "lay": ("lie", "ed"),
    }


def animate(noun: str) -> bool:
    """Whether the noun names a person or an animal: by list, by plural of the list, or by its ending."""
    last = noun.partition(" of ")[0].split()[-1]
    singular = last[:-1] if last.endswith("s") else last
    if last in _ANIMATE or singular in _ANIMATE or last[:-2] in _ANIMATE:
        return True
    return singular not in _NOT_PEOPLE and singular.endswith(
        ("er", "or", "ist", "man", "men", "woman", "ian")
    )


_FEMALE = _words(
    "woman girl lady bride mother mom sister daughter grandmother grandma queen princess female cow hen she"
)
_MALE = _words(
    "man boy guy gentleman groom father dad brother son grandfather grandpa king prince male bull rooster he"
)


def agree(pronoun: str, noun: str, many: bool) -> bool:
    """Whether a pronoun's first form ("he", "it", "they") can stand for the noun."""
    last = noun.split()[-1]
    match pronoun:
        case "he" | "she":
            return not many and animate(noun) and last not in (_FEMALE if pronoun == "he" else _MALE)
        case "it":
            return not many and last not in _FEMALE | _MALE | PRONOUNS.keys()
        case "they":
            return many
    return False
