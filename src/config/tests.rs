//! Every message a config can cause, word for word, on types of the shapes that sections have.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::*;

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Schedule {
    Linear,
    ScaledLinear,
    Cosine,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged, expecting = "a number of shards or \"auto\"")]
enum Shards {
    Count(u32),
    Auto(Auto),
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Auto {
    Auto,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Crop {
    width: u32,
    height: u32,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Optim {
    lr: f64,
    betas: [f64; 2],
    warmup: usize,
    nesterov: bool,
    decay_steps: Option<u64>,
}

impl Default for Optim {
    fn default() -> Self {
        Optim { lr: 2e-4, betas: [0.9, 0.999], warmup: 5000, nesterov: false, decay_steps: None }
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Data {
    path: PathBuf,
    name: String,
    schedule: Schedule,
    shards: Shards,
    channels: Vec<usize>,
    crop: Option<Crop>,
}

impl Default for Data {
    fn default() -> Self {
        Data {
            path: "data".into(),
            name: "toy".to_owned(),
            schedule: Schedule::Linear,
            shards: Shards::Auto(Auto::Auto),
            channels: vec![32, 64],
            crop: None,
        }
    }
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Toy {
    data: Data,
    optim: Optim,
}

fn read(text: &str, sets: &[&str]) -> Result<Toy, ConfigError> {
    let sets: Vec<String> = sets.iter().map(|&set| set.to_owned()).collect();
    parse(text, "toy.toml", &sets)
}

fn message(text: &str, sets: &[&str]) -> String {
    match read(text, sets) {
        Ok(config) => panic!("accepted: {config:?}"),
        Err(error) => error.to_string(),
    }
}

const OPTIM_KEYS: &str = "(keys of `optim`: lr, betas, warmup, nesterov, decay_steps)";

#[test]
fn an_empty_file_is_the_default() {
    assert_eq!(read("", &[]).unwrap(), Toy::default());
}

#[test]
fn values_of_every_type_are_read() {
    let text = "[data]\npath = \"a b\"\nschedule = \"scaled_linear\"\nshards = 4\nchannels = [1, 2, 3]\n\
                crop = { width = 3, height = 4 }\n[optim]\nlr = 1\nbetas = [0.5, 0.9]\ndecay_steps = 7\n";
    let toy = read(text, &[]).unwrap();
    assert_eq!(toy.data.path, Path::new("a b"));
    assert_eq!(toy.data.schedule, Schedule::ScaledLinear);
    assert_eq!(toy.data.shards, Shards::Count(4));
    assert_eq!(toy.data.channels, [1, 2, 3]);
    assert_eq!(toy.data.crop, Some(Crop { width: 3, height: 4 }));
    assert_eq!((toy.optim.lr, toy.optim.betas, toy.optim.decay_steps), (1.0, [0.5, 0.9], Some(7)));
}

#[test]
fn a_resolved_config_reads_back_equal() {
    let toy = read("[optim]\nlr = 1e-8\n", &["data.crop={width=3,height=4}", "data.shards=8"]).unwrap();
    let text = to_toml(&toy).unwrap();
    assert_eq!(read(&text, &[]).unwrap(), toy);
    let text = to_toml(&Toy::default()).unwrap();
    assert!(text.contains("[optim]\nlr = 0.0002\nbetas = [0.9, 0.999]\nwarmup = 5000\nnesterov = false\n"), "{text}");
    assert!(!text.contains("decay_steps"), "{text}");
}

#[test]
fn what_toml_cannot_hold_is_an_error() {
    let error = to_toml(&[1, 2]).unwrap_err();
    assert_eq!(error.to_string(), "cannot write the config as TOML: unsupported array type");
    let error = to_toml(&std::collections::BTreeMap::from([("seed", 1_u64 << 63)])).unwrap_err();
    assert_eq!(error.to_string(), "cannot write the config as TOML: integers go from -2^63 to 2^63 - 1");
    assert_eq!(
        message("[optim]\nwarmup = 9223372036854775808\n", &[]),
        "toy.toml:2:10: not valid TOML: integers go from -2^63 to 2^63 - 1"
    );
    assert_eq!(read("[optim]\nwarmup = 9223372036854775807\n", &[]).unwrap().optim.warmup, (1 << 63) - 1);
}

#[test]
fn unknown_keys() {
    assert_eq!(
        message("[optim]\nlr = 1\n  warmpu = 3\n", &[]),
        format!("toy.toml:3:3: unknown key `optim.warmpu`: did you mean `optim.warmup`? {OPTIM_KEYS}")
    );
    // An optional key, absent from the default config, is offered all the same.
    assert_eq!(
        message("[optim]\ndecay_stpes = 3\n", &[]),
        format!("toy.toml:2:1: unknown key `optim.decay_stpes`: did you mean `optim.decay_steps`? {OPTIM_KEYS}")
    );
    // Nothing like it anywhere: only the list.
    assert_eq!(message("[optim]\nzzz = 3\n", &[]), format!("toy.toml:2:1: unknown key `optim.zzz` {OPTIM_KEYS}"));
}

#[test]
fn a_key_of_another_section() {
    assert_eq!(
        message("[data]\nlr = 1\n", &[]),
        "toy.toml:2:1: unknown key `data.lr`: did you mean `optim.lr`? \
         (keys of `data`: path, name, schedule, shards, channels, crop)"
    );
    assert_eq!(
        message("lr = 1\n", &[]),
        "toy.toml:1:1: unknown key `lr`: did you mean `optim.lr`? (sections and keys at the top: data, optim)"
    );
}

#[test]
fn unknown_sections() {
    assert_eq!(
        message("# a comment\n\n[optm]\nlr = 1\n", &[]),
        "toy.toml:3:2: unknown key `optm`: did you mean `optim`? (sections and keys at the top: data, optim)"
    );
    assert_eq!(
        message("optm.lr = 1\n", &[]),
        "toy.toml:1:1: unknown key `optm`: did you mean `optim`? (sections and keys at the top: data, optim)"
    );
}

#[test]
fn unknown_keys_of_a_nested_table() {
    assert_eq!(
        message("[data]\ncrop = { width = 3, heigth = 4 }\n", &[]),
        "toy.toml:2:21: unknown key `data.crop.heigth`: did you mean `data.crop.height`? \
         (keys of `data.crop`: width, height)"
    );
}

#[test]
fn wrong_types() {
    let cases = [
        ("[optim]\nlr = \"fast\"\n", "toy.toml:2:6: `optim.lr` must be a number, found the string \"fast\""),
        ("[optim]\nwarmup = -3\n", "toy.toml:2:10: `optim.warmup` must be a whole number, 0 or more, found -3"),
        ("[optim]\nwarmup = 2.5\n", "toy.toml:2:10: `optim.warmup` must be a whole number, 0 or more, found 2.5"),
        ("[optim]\nnesterov = 1\n", "toy.toml:2:12: `optim.nesterov` must be true or false, found 1"),
        ("[optim]\nlr = true\n", "toy.toml:2:6: `optim.lr` must be a number, found true"),
        ("[optim]\nlr = [1]\n", "toy.toml:2:6: `optim.lr` must be a number, found a list"),
        ("[optim]\nlr.x = 1\n", "toy.toml:2:1: `optim.lr` must be a number, found a table of keys"),
        ("[data]\nname = 3\n", "toy.toml:2:8: `data.name` must be a string, found 3"),
        ("[data]\npath = 3\n", "toy.toml:2:8: `data.path` must be a path, found 3"),
        ("[data]\nchannels = 3\n", "toy.toml:2:12: `data.channels` must be a list, found 3"),
        (
            "[data]\nchannels = [32, 64,\n  \"x\"]\n",
            "toy.toml:3:3: `data.channels[2]` must be a whole number, 0 or more, found the string \"x\"",
        ),
        ("optim = 3\n", "toy.toml:1:9: `optim` must be a table of keys, found 3"),
        ("[optim]\nbetas = [0.9]\n", "toy.toml:2:9: `optim.betas` must be a list of 2 values, found 1 values"),
    ];
    for (text, expected) in cases {
        assert_eq!(message(text, &[]), expected);
    }
}

#[test]
fn names_that_are_not_among_the_choices() {
    assert_eq!(
        message("[data]\nschedule = \"linar\"\n", &[]),
        "toy.toml:2:12: `data.schedule` cannot be \"linar\": did you mean \"linear\"? \
         (possible: \"linear\", \"scaled_linear\", \"cosine\")"
    );
    assert_eq!(
        message("[data]\nschedule = \"exponential\"\n", &[]),
        "toy.toml:2:12: `data.schedule` cannot be \"exponential\" \
         (possible: \"linear\", \"scaled_linear\", \"cosine\")"
    );
}

#[test]
fn values_a_type_refuses_in_its_own_words() {
    assert_eq!(
        message("[data]\nshards = \"many\"\n", &[]),
        "toy.toml:2:10: `data.shards`: a number of shards or \"auto\", found \"many\""
    );
}

#[test]
fn missing_keys() {
    assert_eq!(message("[data.crop]\nwidth = 3\n", &[]), "toy.toml:1:1: the key `data.crop.height` is missing");
}

#[test]
fn text_that_is_not_toml() {
    let cases = [
        ("[optim\nlr = 1\n", "toy.toml:1:7: not valid TOML: unclosed table, expected `]`"),
        ("[optim]\nlr = \n", "toy.toml:2:6: not valid TOML: string values must be quoted, expected literal string"),
        ("[optim]\nlr = 1\nlr = 2\n", "toy.toml:3:1: not valid TOML: duplicate key"),
        ("garbled", "toy.toml:1:8: not valid TOML: key with no value, expected `=`"),
    ];
    for (text, expected) in cases {
        assert_eq!(message(text, &[]), expected);
    }
}

#[test]
fn columns_count_characters() {
    assert_eq!(
        message("optim = { \"ärger\" = 1 }\n", &[]),
        format!("toy.toml:1:11: unknown key `optim.ärger` {OPTIM_KEYS}")
    );
    assert_eq!(
        message("data = { name = \"üüü\", path = 3 }\n", &[]),
        "toy.toml:1:31: `data.path` must be a path, found 3"
    );
}

#[test]
fn overrides_win_over_the_file_and_the_last_wins() {
    let toy =
        read("[optim]\nlr = 1.0\nwarmup = 3\n", &["optim.lr=0.5", "optim.lr = 0.25", "data.name=\"x y\""]).unwrap();
    assert_eq!((toy.optim.lr, toy.optim.warmup, toy.data.name.as_str()), (0.25, 3, "x y"));
    let toy = read("optim = { lr = 1.0 }\n", &["optim.warmup=7", "data.channels=[8, 16]"]).unwrap();
    assert_eq!((toy.optim.lr, toy.optim.warmup, toy.data.channels), (1.0, 7, vec![8, 16]));
}

#[test]
fn overrides_of_strings_need_no_quotes() {
    let toy = read("", &["data.path=/a b/c=d", "data.schedule=cosine", "data.shards=auto", "data.name="]).unwrap();
    assert_eq!(toy.data.path, Path::new("/a b/c=d"));
    assert_eq!((toy.data.schedule, toy.data.shards), (Schedule::Cosine, Shards::Auto(Auto::Auto)));
    assert_eq!(toy.data.name, "");
    // A string that looks like something else stays a string where only a string will do.
    let toy = read("", &["data.name=2024", "data.path=1.5", "data.shards=3"]).unwrap();
    assert_eq!((toy.data.name.as_str(), toy.data.path.as_path()), ("2024", Path::new("1.5")));
    assert_eq!(toy.data.shards, Shards::Count(3));
}

#[test]
fn overrides_that_only_make_sense_together() {
    let toy = read("", &["data.crop.width=3", "data.crop.height=4"]).unwrap();
    assert_eq!(toy.data.crop, Some(Crop { width: 3, height: 4 }));
    assert_eq!(
        message("", &["data.crop.width=3", "optim.lr=1"]),
        "--set data.crop.width=3: the key `data.crop.height` is missing"
    );
}

#[test]
fn overrides_that_are_wrong() {
    let cases = [
        ("optim.lr=fast", "--set optim.lr=fast: `optim.lr` must be a number, found the string \"fast\""),
        ("optim.warmup=1.5", "--set optim.warmup=1.5: `optim.warmup` must be a whole number, 0 or more, found 1.5"),
        (
            "optim.nesterov=True",
            "--set optim.nesterov=True: `optim.nesterov` must be true or false, found the string \"True\"",
        ),
        ("optim=3", "--set optim=3: `optim` must be a table of keys, found 3"),
        ("optim.lr.x=3", "--set optim.lr.x=3: `optim.lr` must be a number, found a table of keys"),
        (
            "optm.lr=1",
            "--set optm.lr=1: unknown key `optm`: did you mean `optim`? (sections and keys at the top: data, optim)",
        ),
        (
            "data.schedule=cosin",
            "--set data.schedule=cosin: `data.schedule` cannot be \"cosin\": did you mean \"cosine\"? \
             (possible: \"linear\", \"scaled_linear\", \"cosine\")",
        ),
        ("optim.lr", "--set optim.lr: there is no `=`; write --set section.key=value"),
        ("=3", "--set =3: what stands before `=` is not a key; write --set section.key=value"),
        ("a b=3", "--set a b=3: what stands before `=` is not a key; write --set section.key=value"),
    ];
    for (set, expected) in cases {
        assert_eq!(message("[optim]\nlr = 0.1\n", &[set]), expected);
    }
    assert_eq!(message("", &["optim.waltz=3"]), format!("--set optim.waltz=3: unknown key `optim.waltz` {OPTIM_KEYS}"));
    // The fault is that of the override that is wrong, not of those around it.
    assert_eq!(
        message("", &["data.name=x", "optim.lr=y", "optim.warmup=3"]),
        "--set optim.lr=y: `optim.lr` must be a number, found the string \"y\""
    );
}

#[test]
fn an_override_does_not_excuse_the_file() {
    assert_eq!(
        message("[optim]\nlr = \"x\"\n", &["optim.lr=1"]),
        "toy.toml:2:6: `optim.lr` must be a number, found the string \"x\""
    );
}

fn check(toy: &Toy) -> Result<(), OutOfRange> {
    OutOfRange::check(
        toy.optim.lr > 0.0 && toy.optim.lr <= 1.0,
        "optim.lr",
        toy.optim.lr,
        "0 < lr ≤ 1",
        "Adam's step is about lr per weight",
    )?;
    if let Some(i) = toy.data.channels.iter().position(|channels| channels % 8 != 0) {
        return Err(OutOfRange::new(
            format!("data.channels[{i}]"),
            toy.data.channels[i],
            "a multiple of 8",
            "groups have 8 channels",
        ));
    }
    OutOfRange::check(toy.optim.warmup != 5000, "optim.warmup", toy.optim.warmup, "warmup ≠ 5000", "for the test")
}

#[test]
fn values_out_of_range_say_where_they_come_from() {
    let refuse = |text: &str, sets: &[&str]| {
        let sets: Vec<String> = sets.iter().map(|&set| set.to_owned()).collect();
        parse_with::<Toy>(text, "toy.toml", &sets, check).unwrap_err().to_string()
    };
    let lr = "`optim.lr` = 2 is out of range: 0 < lr ≤ 1 (Adam's step is about lr per weight)";
    assert_eq!(refuse("[data]\n[optim]\nlr = 2.0\n", &[]), format!("toy.toml:3:1: {lr}"));
    assert_eq!(refuse("optim.lr = 2.0\n", &[]), format!("toy.toml:1:7: {lr}"));
    assert_eq!(refuse("optim.lr = 1.0\n", &["optim.lr=2"]), format!("--set optim.lr=2: {lr}"));
    assert_eq!(refuse("", &["optim.lr=1", "optim={lr=2.0}"]), format!("--set optim={{lr=2.0}}: {lr}"));
    let channels = "`data.channels[1]` = 9 is out of range: a multiple of 8 (groups have 8 channels)";
    assert_eq!(refuse("[data]\nchannels = [8,\n  9]\n", &[]), format!("toy.toml:3:3: {channels}"));
    assert_eq!(refuse("", &["data.channels=[8,9]"]), format!("--set data.channels=[8,9]: {channels}"));
    assert_eq!(
        refuse("", &[]),
        "toy.toml (default value): `optim.warmup` = 5000 is out of range: warmup ≠ 5000 (for the test)"
    );
    assert!(parse_with::<Toy>("optim.warmup = 1", "toy.toml", &[], check).is_ok());
}

#[test]
fn keys_are_located_by_line_and_column() {
    let text = "# c\n[data]\nname = \"x\"\n\n[optim]\n  lr = 1\nbetas = [1, 2]\n[data.crop]\nwidth = 3\n";
    assert_eq!(locate(text, "optim"), Some((5, 2)));
    assert_eq!(locate(text, "optim.lr"), Some((6, 3)));
    assert_eq!(locate(text, "optim.betas[1]"), Some((7, 13)));
    assert_eq!(locate(text, "data.crop.width"), Some((9, 1)));
    assert_eq!(locate(text, "optim.nesterov"), None);
    assert_eq!(locate("not toml [", "optim"), None);
}

#[test]
fn files() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("toy.toml");
    let error = load::<Toy>(&path, &[]).unwrap_err().to_string();
    assert_eq!(error, format!("config file `{}` does not exist: give the path of a TOML file", path.display()));

    std::fs::write(&path, "[optim]\nlr = 0.5\n").unwrap();
    assert_eq!(load::<Toy>(&path, &["optim.warmup=1".to_owned()]).unwrap().optim.warmup, 1);
    let error = load_with::<Toy>(&path, &["optim.lr=7".to_owned()], check).unwrap_err();
    assert!(matches!(error, ConfigError::OutOfRange { place: Place::Set(_), .. }), "{error}");

    std::fs::write(&path, b"lr = \"\xff\xfe\"").unwrap();
    let error = load::<Toy>(&path, &[]).unwrap_err().to_string();
    let expected = format!("cannot read config file `{}`: stream did not contain valid UTF-8", path.display());
    assert_eq!(error, expected);
    let error = load::<Toy>(folder.path(), &[]).unwrap_err();
    assert!(matches!(error, ConfigError::Read { .. }), "{error}");
}
