"""Words and sentences of the experiments, as templates: what differs between two sentences is what is asked about, and nothing
else. Words are English; which of them a model has as one token its tokenizer says.
"""

PAIRS = (  # singular and plural of what is counted
    'key keys, cabinet cabinets, dog dogs, boy boys, girl girls, car cars, book books, teacher teachers, doctor doctors, '
    'house houses, picture pictures, letter letters, student students, farmer farmers, window windows, chair chairs, '
    'table tables, bird birds, tree trees, door doors, friend friends, player players, writer writers, box boxes, '
    'river rivers, lamp lamps, horse horses, garden gardens, ship ships, road roads, king kings, song songs'
)
NOUNS = tuple(tuple(pair.split()) for pair in PAIRS.split(', '))
BETWEEN = ('near', 'behind', 'beside', 'above')

_WOMEN = 'Mary Anna Sarah Emma Alice Lisa Laura Susan Karen Jane Helen Linda Maria Julia Kate Ruth'
_MEN = 'John Peter David James Robert Thomas Paul Mark Michael Daniel George Henry William Charles Tom Frank'
WOMEN, MEN = _WOMEN.split(), _MEN.split()
DEEDS = (
    '{} stayed at home because',
    '{} left the party early, and then',
    '{} was very tired, so',
    '{} opened the window because',
)
MEETINGS = (
    '{} met {} in the park, and',
    '{} talked with {} for an hour before',
    '{} called {} last night because',
    '{} saw {} at the station when',
)

KINDS = {
    'animal': (
        'dog cat horse cow pig sheep goat rabbit mouse lion tiger bear wolf fox deer elephant monkey snake frog duck'
    ),
    'food': (
        'bread cheese butter rice soup cake apple banana orange lemon potato tomato onion carrot chicken beef '
        'honey sugar salt pasta'
    ),
    'tool': (
        'hammer knife saw drill spoon fork needle brush rope nail ladder shovel axe pen pencil scissors wheel lock '
        'chain hook'
    ),
    'body': ('hand arm leg foot head eye ear nose mouth neck shoulder knee finger toe back chest heart lung bone skin'),
    'clothing': (
        'shirt dress coat hat shoe boot sock glove jacket skirt scarf tie belt suit pants jeans sweater uniform '
        'cap ring'
    ),
    'person': (
        'doctor teacher lawyer farmer soldier nurse artist writer singer king queen judge priest actor student '
        'pilot sailor poet mayor guard'
    ),
    'place': (
        'school hospital church museum library hotel market station airport office farm bank prison restaurant '
        'theater factory village castle harbor bridge'
    ),
    'vehicle': (
        'car bus train truck bicycle boat ship plane van taxi tank tractor helicopter submarine motorcycle wagon '
        'ferry canoe yacht rocket'
    ),
}
NEUTRAL = (
    'I was thinking about the',
    'They told us about a',
    'This is a picture of the',
    'We talked for hours about the',
)

_BOTH = (
    'walk play watch cook run talk drink fight dance sleep rest work help hope plan start stop visit call change '
    'cut deal drive fall fear fly guess hit hunt joke jump kick kiss laugh lie look love need offer paint pass pay '
    'pull push race ride search show sign smile step stay study swim taste touch trade travel trip try turn use '
    'view vote wait wash wish wonder worry'
)
BOTH = _BOTH.split()  # nouns and verbs in one form
AS_NOUN = ('It was a long', 'We had another', 'After the second', 'She remembered every')
AS_VERB = ('They decided to', 'You should not', 'Tomorrow we will', 'He could never')

CAPITALS = (
    'France Paris, Germany Berlin, Italy Rome, Spain Madrid, Japan Tokyo, China Beijing, Russia Moscow, England London, '
    'Egypt Cairo, Greece Athens, Ireland Dublin, Poland Warsaw, Austria Vienna, Canada Ottawa, Norway Oslo, Cuba Havana, '
    'Portugal Lisbon, Hungary Budapest, Sweden Stockholm, Turkey Ankara, Thailand Bangkok, Iran Tehran, Iraq Baghdad, '
    'Kenya Nairobi, Peru Lima, Chile Santiago, Denmark Copenhagen, Finland Helsinki, Belgium Brussels, Netherlands Amsterdam'
)
CAPITAL_OF = tuple(tuple(pair.split()) for pair in CAPITALS.split(', '))
ASKED = (
    'The capital of {} is',
    'The capital city of {} is called',
    'The government of {} has its seat in the capital,',
)

PASSAGE = (
    'The old lighthouse stood at the end of the harbor, and every evening the keeper climbed the stairs to light the lamp. '
    'Ships that came from the north could see it for twenty miles. In winter the wind was so strong that he tied a rope '
    'around his waist before he went out. Nobody in the village remembered a night when the light had failed.',
    'Water boils at a lower temperature on a mountain than at the sea, because the air above it presses less. This is why it '
    'takes longer to cook rice in a hut at three thousand meters. A lid with a valve keeps the steam inside, so that the '
    'pressure rises and the water becomes hotter than one hundred degrees.',
    'When the company opened its first shop, it sold only bicycles and the parts to repair them. Ten years later most of its '
    'money came from electric motors. The founder liked to say that customers had taught him what to build, and that he had '
    'only listened. His daughter, who runs the company today, is less sure that this is true.',
    'A good map leaves out almost everything. It shows the roads but not the cars, the rivers but not the fish, and of all '
    'the houses in a town it may draw a single square. What remains is what the traveler needs to decide where to go next. '
    'The art of making maps is the art of choosing what to forget.',
)
