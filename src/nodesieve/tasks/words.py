"""Words that built-in tasks draw from. A task keeps those that are one token for the tokenizer at hand."""

FEMALE_NAMES = tuple(
    """
    Mary Patricia Jennifer Linda Elizabeth Barbara Susan Jessica Sarah Karen Lisa Nancy Betty Sandra Margaret Ashley Kimberly Emily Donna
    Michelle Carol Amanda Melissa Deborah Stephanie Rebecca Sharon Laura Cynthia Dorothy Amy Kathleen Angela Shirley Emma Brenda Pamela
    Nicole Anna Samantha Katherine Christine Debra Rachel Carolyn Janet Maria Olivia Heather Helen Catherine Diane Julie Victoria Joyce
    Lauren Kelly Christina Ruth Joan Virginia Judith Evelyn Hannah Andrea Megan Cheryl Jacqueline Madison Teresa Abigail Sophia Martha Sara
    Gloria Janice Kathryn Ann Isabella Judy Charlotte Julia Grace Amber Alice Jean Denise Frances Danielle Marilyn Natalie Beverly Diana
    Brittany Theresa Kayla Alexis Doris Lori Tiffany Clara Ella Eva Eleanor Rose Lucy Jane Nora Ellen Irene Sylvia Claire Audrey Molly
    Stella Louise Marie Anne Jill Tina Wendy Gina Holly Erin Tara Monica Rita Vanessa Leah Lydia Naomi Miriam Esther Edith Agnes Ada Ivy
    Iris Daisy Lily Violet Hazel Chloe Zoe Mia Ava Amelia Sophie Kate Katie Maggie Annie Penny Peggy Polly Sally Sue Beth Meg Jenny Kathy
    Cathy Cindy Mandy Sandy Becky Vicky Nina Mona Vera Olga Ingrid Greta Elsa Astrid Freya Fiona Moira Bridget Sheila Maureen Colleen
    Siobhan Deirdre Gwen Rhonda Yvonne Yvette Simone Camille Celine Elise Elaine Helena Lena Lara Nadia Natasha Tatiana Svetlana Irina Elena
    Anita Carmen Rosa Lola Paula Juliet Juliana Gabriela Daniela Mariana Lucia Sofia Valentina Bella Bianca Francesca Chiara Giulia Priya
    Anjali Indira Fatima Aisha Leila Yasmin Zara Amina Mei Yuki Sakura Akiko Jasmine Autumn Summer April June Faith Hope Joy Constance
    Prudence Harriet Beatrice Florence Matilda Rosemary Marion Muriel Mildred Gertrude Bertha Wilma Velma Thelma Edna Erica Krista Kristen
    Kristin Kirsten Brooke Paige Haley Bailey Sierra Savannah Georgia Dakota Carolina Aurora Luna Nova Layla Maya Anya Tanya Sonya Sonia
    Tonya Belinda Melinda Lucinda Regina Josephine Antonia Claudia Cecilia Celia Delia Amelie Adele Estelle Isabel Isabelle Mabel
    """.split()
)

MALE_NAMES = tuple(
    """
    James Robert John Michael David William Richard Joseph Thomas Christopher Charles Daniel Matthew Anthony Mark Donald Steven Andrew Paul
    Joshua Kenneth Kevin Brian Timothy Ronald George Jason Edward Jeffrey Ryan Jacob Gary Nicholas Eric Jonathan Stephen Larry Justin Scott
    Brandon Benjamin Samuel Gregory Alexander Patrick Frank Raymond Jack Dennis Jerry Tyler Aaron Jose Adam Nathan Henry Zachary Douglas
    Peter Kyle Noah Ethan Jeremy Walter Christian Keith Roger Terry Austin Sean Gerald Carl Harold Dylan Arthur Lawrence Jordan Jesse Bryan
    Billy Bruce Gabriel Joe Logan Alan Juan Albert Willie Elijah Wayne Randy Vincent Mason Roy Ralph Bobby Russell Bradley Philip Eugene
    Louis Harry Simon Oliver Leo Max Oscar Felix Hugo Victor Martin Ivan Boris Igor Dmitri Sergei Vladimir Nikolai Alexei Mikhail Pavel
    Anton Leon Luke Owen Liam Connor Ian Neil Colin Graham Stuart Craig Duncan Malcolm Angus Hamish Gordon Bruno Marco Mario Luigi Carlo
    Antonio Roberto Paolo Pedro Pablo Diego Carlos Miguel Luis Jorge Fernando Ricardo Eduardo Alberto Rafael Javier Manuel Francisco Andre
    Pierre Jacques Jean Claude Marcel Henri Philippe Antoine Bernard Gilbert Hans Klaus Karl Otto Fritz Heinrich Wilhelm Ludwig Friedrich
    Johann Stefan Lars Erik Olaf Sven Bjorn Magnus Gustav Axel Nils Ahmed Mohammed Ali Omar Hassan Hussein Ibrahim Khalid Yusuf Karim Raj
    Arjun Vijay Sanjay Ravi Rahul Amit Kumar Chen Wei Hiroshi Kenji Takashi Akira Jim Tim Tom Bob Bill Ben Sam Dan Don Ron Ken Greg Jeff
    Steve Mike Dave Chris Nick Rick Dick Jake Josh Matt Pat Phil Fred Ted Ned Ed Al Hal Gus Stan Walt Hank Chuck Brad Chad Todd Troy Clay
    Cole Drew Grant Glenn Lance Lloyd Miles Mitch Noel Norm Reed Rex Ross Seth Shane Trevor Travis Wade Wesley Zach Caleb Isaac Abraham
    Moses Joel Amos Saul Levi Eli Ezra Jonah Micah Silas Tobias Theodore Edgar Edwin Ernest Francis Frederick Geoffrey Herbert Herman Horace
    Howard Hubert Hugh Humphrey Irving Jerome Julian Julius Leonard Leslie Lewis Lionel Maurice Maxwell Melvin Milton Mortimer Nelson Norman
    Percy Reginald Rodney Roland Rudolph Rupert Sidney Stanley Sylvester Vernon Virgil Warren Wendell Winston Clarence Clifford Clyde Curtis
    Cecil Chester Dale Darren Darryl Dean Derek Dominic Dwight Earl
    """.split()
)

PLACES = tuple(
    """
    store park school office library market station hospital garden museum restaurant house beach church theater airport hotel bank farm
    studio gym bakery cafe pool zoo mall bar club court castle stadium harbor village cinema clinic mountain river lake university college
    bridge forest factory kitchen
    """.split()
)

OBJECTS = tuple(
    """
    drink book ring kiss bag ball letter key box cup phone card gift hat coat flower pen bottle map watch ticket coin knife sandwich
    necklace computer bone basketball cake photo newspaper camera shirt towel guitar bike lamp chair plate spoon candle basket toy rope
    stone picture pencil brush blanket
    """.split()
)

EVENTS = tuple(
    """
    war siege expedition conflict campaign reign project treaty alliance study journey investigation rebellion strike exhibition
    construction voyage pilgrimage dispute festival operation program tour trial debate negotiation partnership occupation famine drought
    epidemic boycott contract marriage research training mission experiment transition renovation development crisis revolution competition
    series survey crusade plague truce collaboration quarantine migration apprenticeship excavation restoration lease feud blockade
    """.split()
)

ROLES = tuple(
    """
    friend cook singer teacher doctor student neighbor dancer leader writer artist player driver speaker painter worker lawyer nurse pilot
    farmer chef runner swimmer reader partner parent manager coach poet critic scientist teammate colleague sailor soldier gardener baker
    builder musician guide lover host guest boss listener
    """.split()
)
