//! Where a cache cannot be written, and what is cleared away.

use std::sync::Mutex;
use std::time::SystemTime;

use super::*;
use crate::data::Phase;

#[derive(Default)]
struct Notices(Mutex<Vec<String>>);

impl Progress for Notices {
    fn update(&self, _: Phase, _: u64, _: u64) {}
    fn notice(&self, message: &str) {
        self.0.lock().unwrap().push(message.to_string());
    }
}

/// Two images of [1, 2, 1].
fn build(sink: &mut Sink) -> Result<Built, DataError> {
    sink.append(&[1, 2])?;
    sink.append(&[3, 4])?;
    let fingerprint = Box::new(|pixels: &Hash| *pixels);
    Ok(Built { count: 2, shape: [1, 2, 1], fingerprint, bad: Bad::default() })
}

#[test]
fn without_a_writable_directory_of_its_own_choice_pixels_stay_in_memory() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("file"), b"").unwrap();
    for cache in [None, Some(dir.path().join("file/cache"))] {
        let notices = Notices::default();
        let source = dir.path();
        let key = [7; 32];
        let request =
            Request { source, options: String::new(), key, bytes: 4, dir: cache, required: false, progress: &notices };
        let cached = open_or_build(&request, &build).unwrap();
        assert!(matches!(cached.bytes, Bytes::Memory(_)));
        assert_eq!((&cached.bytes[cached.offset..], cached.header.count), (&[1, 2, 3, 4][..], 2));
        assert!(notices.0.lock().unwrap()[0].contains("kept in memory"));
        let required = Request { required: true, ..request };
        if required.dir.is_some() {
            // The message names the directory that was asked for, not a file in it.
            let found = open_or_build(&required, &build).map(drop).unwrap_err();
            let DataError::CacheDir { dir: named, .. } = found else { panic!("{found}") };
            assert_eq!(Some(named), required.dir);
        }
    }
}

#[test]
fn a_temporary_file_is_removed_only_when_it_is_old() {
    let dir = tempfile::tempdir().unwrap();
    let request = Request {
        source: dir.path(),
        options: String::new(),
        key: [7; 32],
        bytes: 4,
        dir: Some(dir.path().join("cache")),
        required: true,
        progress: &(),
    };
    let id = "0123456789abcdef0123456789abcdef";
    let folder = dir.path().join("cache");
    std::fs::create_dir(&folder).unwrap();
    let make = |name: String, old: bool| {
        let path = folder.join(name);
        let file = File::create(&path).unwrap();
        if old {
            file.set_modified(SystemTime::now() - 2 * ABANDONED).unwrap();
        }
        path
    };
    let gone = [make(format!("a.pixels.tmp-{id}"), true), make(format!("b.index.tmp-{id}"), true)];
    let stay = [
        make(format!("c.pixels.tmp-{id}"), false),
        make(format!("theirs.tmp-{id}"), true),
        make("d.pixels.tmp-mine".into(), true),
        make("e.pixels".into(), true),
    ];
    open_or_build(&request, &build).unwrap();
    assert!(!gone.iter().any(|path| path.exists()) && stay.iter().all(|path| path.exists()));
}

#[test]
fn a_reserved_disk_that_is_full_names_the_directory() {
    let full = Path::new("/dev/full");
    if !full.exists() {
        return;
    }
    // Every write to this device fails as on a full disk; it stands for the file, the directory is what the user named.
    let mut device = File::options().write(true).open(full).unwrap();
    let mut sink = Sink::new(Output::File { file: &mut device, dir: Path::new("/scratch/cache"), bytes: 77 });
    let error = sink.append(&[1; 100]).unwrap_err().to_string();
    let start = "data.cache_dir = /scratch/cache: cannot write the cache: ";
    assert!(error.starts_with(start) && error.contains("77 bytes free"), "{error}");
}
