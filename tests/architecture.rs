//! The rooms of the house and their order, read from the source: each uses only those above it in `src/lib.rs`, `unsafe` stays where it
//! belongs, and files stay small.

use std::path::{Path, PathBuf};

/// Where `unsafe` may stand: devices, vector code, thin calls of the system or of libraries.
const UNSAFE: [&str; 4] = ["device/", "simd/", "data/pixels.rs", "collective/host/segment.rs"];
/// A file beyond this has two subjects.
const LONGEST: usize = 450;
/// Lines between an `unsafe` and the reason for it, at most; another `unsafe` does not stand between them.
const REACH: usize = 8;

struct Source {
    /// Below `src/`, with `/`.
    name: String,
    lines: Vec<String>,
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src")
}

fn sources() -> Vec<Source> {
    let mut found = Vec::new();
    let mut left = vec![root()];
    while let Some(dir) = left.pop() {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                left.push(path);
            } else if path.extension().is_some_and(|e| e == "rs") {
                let name = path.strip_prefix(root()).unwrap().to_str().unwrap().replace('\\', "/");
                let lines = std::fs::read_to_string(&path).unwrap().lines().map(str::to_owned).collect();
                found.push(Source { name, lines });
            }
        }
    }
    found.sort_by(|a, b| a.name.cmp(&b.name));
    assert!(found.len() > 100, "the source is there");
    found
}

impl Source {
    /// The room, and the path of modules below the crate: `ops/add/cpu.rs` is `["ops", "add", "cpu"]`.
    fn modules(&self) -> Vec<&str> {
        self.name.trim_end_matches(".rs").trim_end_matches("/mod").split('/').collect()
    }

    /// Whether all of it is compiled for tests only.
    fn is_test(&self) -> bool {
        let modules = self.modules();
        modules.iter().any(|m| *m == "tests" || *m == "testing" || m.ends_with("_tests"))
    }

    /// The code that ships, as (line number from 1, code): comments and what stands under `#[cfg(test)]` left out.
    fn code(&self) -> Vec<(usize, &str)> {
        let mut code = Vec::new();
        let mut lines = self.lines.iter().enumerate().peekable();
        while let Some((number, line)) = lines.next() {
            let text = line.trim_start();
            if text.starts_with("#[cfg(test)]") {
                // An item at this indentation: to its closing brace, or the one line it is.
                let indent = line.len() - text.len();
                for (_, line) in lines.by_ref() {
                    let text = line.trim_start();
                    let is_here = line.len() - text.len() == indent;
                    if is_here && (text.starts_with('}') || text.ends_with(';') || text.ends_with('}')) {
                        break;
                    }
                }
            } else if !text.starts_with("//") {
                code.push((number + 1, line.split(" // ").next().unwrap_or_default()));
            }
        }
        code
    }
}

fn rooms() -> Vec<String> {
    let lib = std::fs::read_to_string(root().join("lib.rs")).unwrap();
    let rooms: Vec<String> =
        lib.lines().filter_map(|l| Some(l.strip_prefix("pub mod ")?.strip_suffix(';')?.to_owned())).collect();
    assert!(rooms.len() >= 15 && rooms.last().unwrap() == "cli", "{rooms:?}");
    rooms
}

fn is_name(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// The rooms that a line names by `crate::room`.
fn used_from_crate(line: &str) -> Vec<&str> {
    let is_path = |at: usize| !line[..at].chars().next_back().is_some_and(|c| is_name(c) || c == '$');
    line.match_indices("crate::")
        .filter(|(at, _)| is_path(*at))
        .map(|(at, prefix)| {
            let rest = &line[at + prefix.len()..];
            &rest[..rest.find(|c| !is_name(c)).unwrap_or(rest.len())]
        })
        .collect()
}

#[test]
fn rooms_use_only_those_above_them() {
    let rooms = rooms();
    let place = |name: &str| rooms.iter().position(|room| room == name);
    let mut used = 0;
    for source in sources().iter().filter(|s| !s.is_test()) {
        let modules = source.modules();
        let Some(own) = place(modules[0]) else {
            assert!(["lib", "main"].contains(&modules[0]), "src/{} belongs to no room of src/lib.rs", source.name);
            continue;
        };
        for (number, line) in source.code() {
            let at = format!("src/{}:{number}", source.name);
            for name in used_from_crate(line) {
                // Macros stand at the root whatever room they are of.
                if name == "multiversion" {
                    continue;
                }
                let other =
                    place(name).unwrap_or_else(|| panic!("{at}: crate::{name} is no room; write crate::room::…"));
                assert!(other <= own, "{at}: {} uses {name}, which stands below it in src/lib.rs", modules[0]);
                assert!(name != "cli" || modules[0] == "cli", "{at}: nothing uses cli");
                used += 1;
            }
            // `super::` as far as the crate would reach another room unseen.
            assert!(!line.contains(&"super::".repeat(modules.len())), "{at}: climbs out of its room");
        }
    }
    assert!(used > 100, "only {used} uses were found: this test no longer reads the source");
}

#[test]
fn unsafe_stays_in_its_places_and_says_why_it_is_sound() {
    let mut blocks = 0;
    for source in sources() {
        // The last line that a reason has been given for.
        let mut answered = 0;
        let allowed = UNSAFE.iter().any(|place| source.name.starts_with(place))
            || (source.name.starts_with("ops/") && source.name.ends_with("/cuda.rs"));
        for (number, line) in source.code() {
            let words: Vec<&str> = line.split(|c| !is_name(c)).collect();
            if !words.contains(&"unsafe") {
                continue;
            }
            let at = format!("src/{}:{number}: {}", source.name, line.trim());
            assert!(allowed, "{at}\nunsafe belongs to {UNSAFE:?} and ops/*/cuda.rs");
            blocks += 1;
            // An `unsafe fn` states its conditions where it is declared; what is answered for is a block or an `impl`.
            if !line.contains("unsafe {") && !line.contains("unsafe impl") {
                continue;
            }
            let is_reason = |line: &String| line.contains("SAFETY:");
            let above = &source.lines[number.saturating_sub(1 + REACH).max(answered)..number];
            assert!(above.iter().any(is_reason), "{at}\nno SAFETY line within the {REACH} lines before it");
            answered = number;
        }
    }
    assert!(blocks > 20, "only {blocks} uses of unsafe were found: this test no longer reads the source");
}

#[test]
fn files_have_one_subject() {
    for source in sources() {
        let lines = source.lines.len();
        assert!(lines <= LONGEST, "src/{} has {lines} lines, more than {LONGEST}: make it two", source.name);
    }
}

#[test]
fn this_test_sees_what_it_looks_for() {
    let line = "let x = crate::tape::Tape::new(); $crate::simd::x(); use crate::ops;";
    assert_eq!(used_from_crate(line), ["tape", "ops"]);
    let source = Source {
        name: "ops/add/mod.rs".into(),
        lines: [
            "use a;",
            "// crate::cli",
            "#[cfg(test)]",
            "mod tests;",
            "b // c",
            "#[cfg(test)]",
            "mod t {",
            "    d",
            "}",
            "e",
        ]
        .map(str::to_owned)
        .to_vec(),
    };
    assert_eq!(source.modules(), ["ops", "add"]);
    assert_eq!(source.code(), [(1, "use a;"), (5, "b"), (10, "e")]);
}
