"""Words that built-in tasks draw from. A task keeps those that are one token for the tokenizer at hand."""

FEMALE_NAMES = tuple(
    """
    Mary Patricia Jennifer Linda Elizabeth Barbara Susan Jessica Sarah Karen Lisa Nancy Betty Sandra Margaret Ashley Kimberly Emily Donna
    Michelle Carol Amanda Melissa Deborah Stephanie Rebecca Sharon Laura Cynthia Dorothy Amy Kathleen Angela Shirley Emma Brenda Pamela
    Nicole Anna Samantha Katherine Christine Debra Rachel Carolyn Janet Maria Olivia Heather Helen Catherine Diane Julie Victoria Joyce
    Lauren Kelly Christina Ruth Joan Judith Evelyn Hannah Andrea Megan Cheryl Jacqueline Madison Teresa Abigail Sophia Martha Sara
    Gloria Janice Kathryn Ann Isabella Judy Charlotte Julia Alice Denise Frances Danielle Marilyn Natalie Beverly Diana
    Brittany Theresa Kayla Alexis Doris Lori Tiffany Clara Ella Eva Eleanor Lucy Jane Nora Ellen Irene Sylvia Claire Audrey Molly
    Stella Louise Marie Anne Jill Tina Wendy Gina Holly Erin Tara Monica Rita Vanessa Leah Lydia Naomi Miriam Esther Edith Agnes Ada
    Chloe Zoe Mia Ava Amelia Sophie Kate Katie Maggie Annie Peggy Sally Beth Meg Jenny Kathy
    Cathy Cindy Mandy Becky Vicky Nina Mona Vera Olga Ingrid Greta Elsa Astrid Freya Fiona Moira Bridget Sheila Maureen Colleen
    Siobhan Deirdre Gwen Rhonda Yvonne Yvette Simone Camille Celine Elise Elaine Helena Lena Lara Nadia Natasha Tatiana Svetlana Irina Elena
    Anita Carmen Rosa Lola Paula Juliet Juliana Gabriela Daniela Mariana Lucia Sofia Valentina Bella Bianca Francesca Chiara Giulia Priya
    Anjali Indira Fatima Aisha Leila Yasmin Zara Amina Yuki Sakura Akiko Jasmine
    Harriet Beatrice Matilda Rosemary Marion Muriel Mildred Gertrude Bertha Wilma Velma Thelma Edna Erica Krista Kristen
    Kristin Kirsten Brooke Paige Haley Bailey Layla Maya Anya Tanya Sonya Sonia
    Tonya Belinda Melinda Lucinda Regina Josephine Antonia Claudia Cecilia Celia Delia Amelie Adele Estelle Isabel Isabelle Mabel
    """.split()
)

MALE_NAMES = tuple(
    """
    James Robert John Michael David William Richard Joseph Thomas Christopher Charles Daniel Matthew Anthony Donald Steven Andrew Paul
    Joshua Kenneth Kevin Brian Timothy Ronald George Jason Edward Jeffrey Ryan Jacob Gary Nicholas Eric Jonathan Stephen Larry Justin Scott
    Brandon Benjamin Samuel Gregory Alexander Patrick Frank Raymond Jack Dennis Jerry Tyler Aaron Jose Adam Nathan Henry Zachary Douglas
    Peter Kyle Noah Ethan Jeremy Walter Keith Roger Terry Sean Gerald Carl Harold Dylan Arthur Lawrence Jesse Bryan
    Billy Bruce Gabriel Joe Logan Alan Juan Albert Willie Elijah Wayne Randy Vincent Roy Ralph Bobby Russell Bradley Philip Eugene
    Louis Harry Simon Oliver Leo Max Oscar Felix Hugo Victor Martin Ivan Boris Igor Dmitri Sergei Vladimir Nikolai Alexei Mikhail Pavel
    Anton Leon Luke Owen Liam Connor Ian Neil Colin Graham Stuart Craig Duncan Malcolm Angus Hamish Gordon Bruno Marco Luigi Carlo
    Antonio Roberto Paolo Pedro Pablo Diego Carlos Miguel Luis Jorge Fernando Ricardo Eduardo Alberto Rafael Javier Manuel Francisco Andre
    Pierre Jacques Claude Marcel Henri Philippe Antoine Bernard Gilbert Hans Klaus Karl Fritz Heinrich Wilhelm Ludwig Friedrich
    Johann Stefan Lars Erik Olaf Sven Bjorn Magnus Gustav Axel Nils Ahmed Mohammed Ali Omar Hassan Hussein Ibrahim Khalid Yusuf Karim
    Arjun Vijay Sanjay Ravi Rahul Amit Kumar Hiroshi Kenji Takashi Akira Jim Tim Tom Bob Bill Ben Sam Dan Ron Ken Greg Jeff
    Steve Mike Dave Chris Nick Jake Josh Matt Phil Fred Hank
    Glenn Lloyd Mitch Ross Seth Shane Trevor Travis Wesley Zach Caleb Isaac Abraham
    Joel Levi Eli Ezra Jonah Micah Silas Tobias Theodore Edgar Edwin Ernest Francis Frederick Geoffrey Herbert Herman Horace
    Howard Hubert Hugh Humphrey Irving Jerome Julian Julius Leonard Leslie Lewis Lionel Maurice Maxwell Melvin Milton Mortimer Nelson Norman
    Reginald Rodney Roland Rudolph Rupert Sidney Stanley Sylvester Vernon Virgil Warren Wendell Winston Clarence Clifford Clyde Curtis
    Darren Darryl Derek Dominic Dwight
    """.split()
)

# Surnames, and given names known from history, books and many countries: for training prompts alone.
FURTHER_NAMES = tuple(
    """
    Dante Katrina Cornelius Deng Alex Jimmy Beck Josiah Georg Charlie Jeremiah Zhou Mario Galileo Tony Lucas Caesar Curt Pete Tian Zhao Kai
    Nik Peng Kent Franklin Lorenzo Winchester Mack Shaw Kang Doug Mei Saul Robin Fran Barry Chen Constantine Feng Dion Jamie Tao Heath
    Abdullah Artem Liu Jin Otto Chan Tai Wei Copernicus Paulo Raja Philipp Einstein Sami Kim Zak Rex Shu Chandra Yuan Ahmad Brett Arnold
    Isaiah Brad Newton Denis Dale Mason Brooks Jackson Dallas Jean Salvador Griffith Abel Vlad Nino Titus Amos Jing Homer Ming Ezekiel Fitz
    Santiago Mohammad Austin Edmund Johnny Wren Rey Tommy Holland Cameron Casey Dong Wong Brady Miranda Solomon Daisy Morrison Adelaide
    Chester Edison Carr Wade Shan Calvin Plato Stan Lincoln Hong Glen Morgan Riley Taylor Fraser Jess Sydney Percy Timmy Cole Zhu Calhoun
    Francesco Polly Antony Napoleon Fletcher Hutchinson Fleming Willis Robinson Locke Henderson Harrison Chad Russ Apollo Aurora Marcus Wang
    Hansen Burke Davis Cornell Lazarus Quinn Hudson Werner Kurt Walton Athena Cheng Dewey Wolfgang Bennett Ernst Bart Byron Ferdinand Carter
    Kennedy Caroline Forrest Costa Rockefeller Zhang Clement Smith Cruz Nathaniel Cromwell Leonardo Sebastian Levin Raj Dawson Churchill
    Ford Beethoven Lyndon Fay Harper Moses Geoff Jordan Hoover Abram Mozart Pierce Conrad Rao Jackie Santos Quincy Murphy Spencer Allen
    Hancock Belle Franz Wes Peters Benny Hermann Alma Troy Floyd Clare Norris Finn Schmidt Higgins Tesla Wen Moore Turner Coleman Kirk
    Powell Carson Walker Brent Michelangelo Andy Woodrow Blair Cleopatra Yun Abdul Georgia Herschel Cyrus Clayton Picasso Dudley Giovanni
    Clark Huang Abe Jay Franco Addison Thompson Singh Aristotle Preston Gibson Boyle Marshall Rutherford Benedict Miller Webster Blake
    Thomson Hampton Jon Andreas Dana Koch Engel Zimmer Johnson Williams Jones Brown Wilson Anderson Lee Hall Adams Mitchell Roberts Phillips
    Campbell Evans Edwards Collins Stewart Rogers Reed Cook Cooper Richardson Cox Ward Watson Gray Hughes Price Myers Foster Sanders Perry
    Butler Barnes Fisher Simmons Sullivan Wallace Hayes Bryant Ellis Stevens Murray Freeman Wells Simpson Tucker Porter Hunter Hicks
    Crawford Boyd Ramos Wagner Hunt Parker Morris Baker Wright Green Hill Young King Bell Long Garcia Martinez Lopez Gonzalez Rodriguez
    Hernandez Perez Sanchez Ramirez Torres Flores Rivera Gomez Diaz Reyes Ortiz Morales Mendoza Vargas Silva Fernandez Nguyen Patel Khan
    Gupta Sharma Suzuki Tanaka Sato Yamamoto Ivanov Petrov Novak Kowalski Rossi Weber Meyer Fischer Becker Schneider Larsen Olsen Jensen
    Nielsen Andersson Johansson Darwin Kepler Pascal Hegel Kant Marx Freud Jung Hume Descartes Bacon Dickens Hardy Wilde Orwell Hemingway
    Steinbeck Twain Poe Whitman Emerson Thoreau Hawthorne Melville Tolstoy Chekhov Dostoevsky Gandhi Roosevelt Eisenhower Jefferson Monroe
    Hamilton Grant Sherman Houston Bowie Crockett Sherlock Hermione Frodo Gandalf Romeo Hamlet Ophelia Macbeth Othello Lear Odysseus
    Achilles Hector Zeus Hera Poseidon Thor Odin Loki Osiris
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

# singular/plural
NUMBERED = tuple(
    """
    key/keys cat/cats dog/dogs horse/horses bird/birds tree/trees house/houses book/books letter/letters picture/pictures car/cars boat/boats
    ship/ships chair/chairs table/tables lamp/lamps window/windows door/doors wall/walls garden/gardens road/roads bridge/bridges tower/towers
    boy/boys girl/girls man/men woman/women child/children teacher/teachers doctor/doctors student/students soldier/soldiers farmer/farmers
    singer/singers writer/writers player/players driver/drivers worker/workers lawyer/lawyers nurse/nurses pilot/pilots king/kings queen/queens
    prince/princes guard/guards guest/guests friend/friends neighbor/neighbors cousin/cousins brother/brothers sister/sisters son/sons
    daughter/daughters flower/flowers plant/plants rock/rocks stone/stones river/rivers mountain/mountains hill/hills island/islands
    village/villages city/cities town/towns school/schools church/churches hospital/hospitals store/stores shop/shops hotel/hotels
    machine/machines engine/engines computer/computers phone/phones camera/cameras clock/clocks coin/coins ring/rings hat/hats coat/coats
    shirt/shirts shoe/shoes bag/bags box/boxes bottle/bottles cup/cups plate/plates knife/knives song/songs story/stories poem/poems
    """.split()
)

# country/capital
CAPITALS = tuple(
    """
    France/Paris Germany/Berlin Italy/Rome Spain/Madrid Portugal/Lisbon Austria/Vienna Greece/Athens Poland/Warsaw Hungary/Budapest
    Russia/Moscow Ukraine/Kiev Sweden/Stockholm Norway/Oslo Denmark/Copenhagen Finland/Helsinki Ireland/Dublin Scotland/Edinburgh
    England/London Belgium/Brussels Netherlands/Amsterdam Switzerland/Bern Turkey/Ankara Egypt/Cairo Israel/Jerusalem Iraq/Baghdad
    Iran/Tehran Syria/Damascus Lebanon/Beirut Afghanistan/Kabul Pakistan/Islamabad China/Beijing Japan/Tokyo Korea/Seoul
    Thailand/Bangkok Vietnam/Hanoi Indonesia/Jakarta Philippines/Manila Malaysia/Kuala Australia/Canberra Canada/Ottawa Cuba/Havana
    Peru/Lima Chile/Santiago Argentina/Buenos Venezuela/Caracas Kenya/Nairobi Ethiopia/Addis Libya/Tripoli Tunisia/Tunis Bulgaria/Sofia
    Romania/Bucharest Serbia/Belgrade Croatia/Zagreb Nepal/Kathmandu Bangladesh/Dhaka Taiwan/Taipei Jordan/Amman Ghana/Accra
    Wales/Cardiff Ecuador/Quito Colombia/Bogota Uganda/Kampala Somalia/Mogadishu Qatar/Doha Zimbabwe/Harare Latvia/Riga Cyprus/Nicosia
    """.split()
)

ARGUMENTS = tuple(
    """
    size shape name value index key path file data text line word page user role code date time year month day hour count total price
    cost rate ratio level score rank grade width height depth length weight color style font image video audio sound signal event state
    status mode type kind class group team player game round step stage phase order list table row column cell node edge graph tree
    root leaf branch parent child target source origin point vector matrix array query filter limit offset start end first last
    result output input error message title label tag note topic field form model layer unit block chunk batch buffer cache queue stack
    token string number base scale range region country city street address phone email port host server client request response
    """.split()
)
