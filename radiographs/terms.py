"""Labels in other vocabularies than the 14 of CheXpert, and what follows from them.

Each table leads from a term, in lower case, to the labels that it asserts, several of them joined by |. An empty text
stands for a finding that CheXpert has no label for. A parent (lung opacity of consolidation, edema, pneumonia and
atelectasis; enlarged cardiomediastinum of cardiomegaly) follows only where a row says so.

A term that a list does not hold is unknown, not negative: its reader may not have looked for it.
"""
from radiographs.fields import LABELS, field_of


def chexpert_labels(row):
    """The 14 labels of a row in CheXpert's coding: 1 positive, 0 negative; -1 (uncertain) and blank unknown, hence
    None."""
    value = {"1": "positive", "1.0": "positive", "0": "negative", "0.0": "negative"}
    return {field_of(label): value.get(str(row.get(label)).strip()) for label in LABELS}


def labels_of(terms, table):
    """The labels that a list of terms asserts. Beside any finding, also one without a label, No Finding is negative.
    Devices, and terms that the table does not hold ("unchanged", "sternotomy"), are no findings and say nothing of No
    Finding."""
    known = [table[term.strip().lower()] for term in terms if term.strip().lower() in table]
    labels = {field_of(label): "positive" for joined in known for label in joined.split("|") if label}
    if any(joined not in ("No Finding", "Support Devices") for joined in known):
        labels["no_finding"] = "negative"
    return labels


NIH_TERMS = {
    "no finding": "No Finding", "cardiomegaly": "Cardiomegaly", "edema": "Edema", "consolidation": "Consolidation",
    "pneumonia": "Pneumonia", "atelectasis": "Atelectasis", "pneumothorax": "Pneumothorax",
    "effusion": "Pleural Effusion",
    "infiltration": "Lung Opacity",          # the term covers any ill-defined opacity, not one cause of it
    "nodule": "Lung Lesion", "mass": "Lung Lesion",
    "pleural_thickening": "Pleural Other", "emphysema": "", "fibrosis": "", "hernia": ""}

VINDR_TERMS = {
    "no finding": "No Finding", "cardiomegaly": "Cardiomegaly", "edema": "Edema", "consolidation": "Consolidation",
    "pneumonia": "Pneumonia", "atelectasis": "Atelectasis", "pneumothorax": "Pneumothorax",
    "lung opacity": "Lung Opacity", "pleural effusion": "Pleural Effusion", "pleural thickening": "Pleural Other",
    "rib fracture": "Fracture", "clavicle fracture": "Fracture",
    "infiltration": "Lung Opacity",          # as in ChestX-ray14
    "ild": "Lung Opacity",                   # interstitial disease shows as reticular opacity; CheXpert counts it there
    "nodule/mass": "Lung Lesion", "lung tumor": "Lung Lesion", "lung cavity": "Lung Lesion", "lung cyst": "Lung Lesion",
    "aortic enlargement": "Enlarged Cardiomediastinum",  # it widens the mediastinal contour
    "mediastinal shift": "",                 # a displaced mediastinum is not an enlarged one
    **dict.fromkeys((
        "calcification", "emphysema", "enlarged pa", "pulmonary fibrosis", "other lesion", "copd", "tuberculosis",
        "other disease", "other diseases"), "")}
# Those that VinDr's readers were asked about, and whose absence is therefore negative. Not Enlarged
# Cardiomediastinum: an aorta of normal width does not say that the mediastinum is.
VINDR_ASKED = [term for term, labels in VINDR_TERMS.items() if labels not in ("", "Enlarged Cardiomediastinum")]

PADCHEST_TERMS = {
    "normal": "No Finding", "cardiomegaly": "Cardiomegaly", "pulmonary edema": "Edema",
    "consolidation": "Consolidation", "pneumonia": "Pneumonia", "atypical pneumonia": "Pneumonia",
    "pneumothorax": "Pneumothorax",
    "hydropneumothorax": "Pneumothorax|Pleural Effusion",
    **dict.fromkeys((
        "atelectasis", "laminar atelectasis", "lobar atelectasis", "segmental atelectasis", "total atelectasis",
        "round atelectasis", "atelectasis basal"), "Atelectasis"),
    **dict.fromkeys((
        "pleural effusion", "loculated pleural effusion", "loculated fissural effusion", "empyema",
        "hemothorax"), "Pleural Effusion"),
    **dict.fromkeys((
        "pleural thickening", "apical pleural thickening", "calcified pleural thickening", "pleural plaques",
        "calcified pleural plaques", "pleural mass", "fissure thickening", "minor fissure thickening",
        "major fissure thickening"), "Pleural Other"),
    **dict.fromkeys((
        "nodule", "multiple nodules", "mass", "pulmonary mass", "cavitation", "abscess", "cyst", "lung metastasis",
        "granuloma", "calcified granuloma"), "Lung Lesion"),
    **dict.fromkeys((
        "infiltrates", "increased density", "ground glass pattern", "interstitial pattern",
        "reticular interstitial pattern", "reticulonodular interstitial pattern", "miliary opacities",
        "lymphangitis carcinomatosa", "kerley lines"), "Lung Opacity"),
    "alveolar pattern": "Lung Opacity",      # air spaces filled by whatever: wider than consolidation
    "air bronchogram": "Consolidation|Lung Opacity",  # air in bronchi is seen only where the lung around them is solid
    **dict.fromkeys((
        "fracture", "rib fracture", "clavicle fracture", "humeral fracture", "vertebral fracture",
        "callus rib fracture"), "Fracture"),  # a healed rib counts, as in CheXpert
    **dict.fromkeys((
        "mediastinal enlargement", "superior mediastinal enlargement", "mediastinal mass", "goiter",
        "aortic aneurysm", "mediastinic lipomatosis"), "Enlarged Cardiomediastinum"),
    "pericardial effusion": "Enlarged Cardiomediastinum",  # it widens the silhouette without a larger heart
    **dict.fromkeys((
        "pacemaker", "dual chamber device", "single chamber device", "dai", "electrical device", "catheter",
        "central venous catheter", "central venous catheter via jugular vein",
        "central venous catheter via subclavian vein", "central venous catheter via umbilical vein",
        "reservoir central venous catheter", "endotracheal tube", "tracheostomy tube", "nsg tube",
        "chest drain tube", "ventriculoperitoneal drain tube", "gastrostomy tube", "nephrostomy tube",
        "double j stent", "artificial heart valve", "artificial mitral heart valve",
        "artificial aortic heart valve", "aortic endoprosthesis"), "Support Devices"),
    # Findings without a label: costophrenic angle blunting is a scar as often as fluid, heart insufficiency and
    # vascular redistribution are signs beside edema, not edema.
    **dict.fromkeys((
        "costophrenic angle blunting", "heart insufficiency", "vascular redistribution",
        "central vascular redistribution", "copd signs", "emphysema", "air trapping", "hyperinflated lung",
        "flattened diaphragm", "bullas", "bronchiectasis", "pulmonary fibrosis", "fibrotic band", "chronic changes",
        "tuberculosis", "tuberculosis sequelae", "asbestosis signs", "volume loss", "hypoexpansion",
        "hypoexpansion basal", "lung vascular paucity", "bronchovascular markings", "air fluid level",
        "post radiotherapy changes", "lepidic adenocarcinoma", "respiratory distress", "subcutaneous emphysema",
        "pneumomediastinum", "pneumoperitoneo", "hilar enlargement", "hilar congestion",
        "vascular hilar enlargement", "pulmonary artery enlargement", "pulmonary artery hypertension",
        "pulmonary hypertension", "pulmonary venous hypertension", "adenopathy", "calcified adenopathy",
        "calcified mediastinal adenopathy", "calcified densities", "heart valve calcified", "aortic elongation",
        "descendent aortic elongation", "ascendent aortic elongation", "supra aortic elongation",
        "aortic atheromatosis", "aortic button enlargement", "right sided aortic arch", "dextrocardia",
        "azygoesophageal recess shift", "mediastinal shift", "tracheal shift", "hiatal hernia",
        "esophagic dilatation", "hemidiaphragm elevation", "diaphragmatic eventration", "chilaiditi sign",
        "scoliosis", "kyphosis", "osteopenia", "osteoporosis", "axial hyperostosis",
        "vertebral degenerative changes", "vertebral compression", "vertebral anterior compression",
        "non axial articular degenerative changes", "subacromial space narrowing",
        "sternoclavicular junction hypertrophy", "costochondral junction hypertrophy", "thoracic cage deformation",
        "pectum excavatum", "pectum carinatum", "blastic bone lesion", "lytic bone lesion", "sclerotic bone lesion",
        "bone metastasis", "breast mass", "soft tissue mass", "calcified fibroadenoma", "gynecomastia"), "")}
# In no table, for they are no findings: "unchanged", what surgery left (sternotomy, mastectomy, sutures,
# osteosynthesis, prostheses of breast and joints, metal), foreign bodies, variants (azygos lobe, cervical rib), what
# only looks like a finding (nipple shadow, pseudonodule, end on vessel), obesity.
