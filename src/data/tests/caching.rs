//! The cache is used when it fits and built again when it does not, and never breaks a run.

use std::sync::Barrier;

use super::*;

/// Opens and says whether images were decoded, and what was noticed.
fn open(place: &Place, config: &DataConfig) -> (Vec<u8>, bool, String) {
    let log = Log::default();
    let dataset = Dataset::open(config, None, &log).unwrap();
    let _ = place;
    (all(&dataset), log.decoded(), log.text())
}

fn cache_file(place: &Place) -> PathBuf {
    let files = fs::read_dir(place.path("cache")).unwrap().map(|e| e.unwrap().path());
    let found: Vec<PathBuf> = files.filter(|p| p.extension().is_some_and(|e| e == "pixels")).collect();
    assert_eq!(found.len(), 1, "{found:?}");
    found.into_iter().next().unwrap()
}

#[test]
fn a_cache_is_used_again_until_the_content_changes() {
    let place = Place::new();
    let (first, second) = (noise(4 * 5 * 5, 1), noise(4 * 5 * 5, 2));
    let path = place.write("x.npz", &npz(&[("arr_0.npy", npy("|u1", "(4, 5, 5)", &first))], false));
    let config = place.config("x.npz");
    assert_eq!(open(&place, &config), (first.clone(), true, String::new()));
    assert_eq!(open(&place, &config), (first.clone(), false, String::new()));

    // Replaced by a file of the same size and the same times.
    let times = fs::metadata(&path).unwrap().modified().unwrap();
    let length = fs::metadata(&path).unwrap().len();
    place.write("x.npz", &npz(&[("arr_0.npy", npy("|u1", "(4, 5, 5)", &second))], false));
    fs::File::options().write(true).open(&path).unwrap().set_modified(times).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().len(), length);
    let (pixels, decoded, notices) = open(&place, &config);
    assert_eq!((pixels, decoded), (second, true));
    assert!(notices.contains("other content") && notices.contains("built again"), "{notices}");
    cache_file(&place); // still one
}

#[test]
fn a_folders_cache_notices_a_picture_of_the_same_size_and_time() {
    let place = Place::new();
    save_picture(&place.path("p/a.png"), &[10; 64], 8, 8);
    save_picture(&place.path("p/b.png"), &[20; 64], 8, 8);
    let config = DataConfig { size: Some(ImageSize::square(8)), channels: Some(1), ..place.config("p") };
    assert_eq!(open(&place, &config), ([[10; 64], [20; 64]].concat(), true, String::new()));
    assert_eq!(open(&place, &config), ([[10; 64], [20; 64]].concat(), false, String::new()));
    let path = place.path("p/b.png");
    let before = fs::metadata(&path).unwrap();
    save_picture(&path, &[30; 64], 8, 8);
    assert_eq!(fs::metadata(&path).unwrap().len(), before.len());
    fs::File::options().write(true).open(&path).unwrap().set_modified(before.modified().unwrap()).unwrap();
    assert_eq!(open(&place, &config).0, [[10; 64], [30; 64]].concat());
    // One more, one less.
    save_picture(&place.path("p/sub/c.png"), &[40; 64], 8, 8);
    assert_eq!(open(&place, &config).0, [[10; 64], [30; 64], [40; 64]].concat());
    fs::remove_file(place.path("p/a.png")).unwrap();
    assert_eq!(open(&place, &config).0, [[30; 64], [40; 64]].concat());
    // Another size has its own cache; the first stays valid.
    let small = DataConfig { size: Some(ImageSize::square(4)), ..config.clone() };
    assert_eq!(open(&place, &small).0, [[30; 16], [40; 16]].concat());
    assert!(!open(&place, &config).1);
    assert!(!open(&place, &small).1);
}

#[test]
fn a_cache_belongs_to_its_content() {
    let place = Place::new();
    for (name, value) in [("a.png", 10), ("sub/b.png", 20)] {
        save_picture(&place.path(&format!("p/{name}")), &[value; 64], 8, 8);
    }
    let at = |name: &str| DataConfig { size: Some(ImageSize::square(8)), channels: Some(1), ..place.config(name) };
    let pixels = [[10; 64], [20; 64]].concat();
    assert_eq!(open(&place, &at("p")), (pixels.clone(), true, String::new()));
    // Touched.
    let long_ago = std::time::SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000_000);
    fs::File::options().write(true).open(place.path("p/a.png")).unwrap().set_modified(long_ago).unwrap();
    assert_eq!(open(&place, &at("p")), (pixels.clone(), false, String::new()));
    // Copied, which changes inodes and times too, under other names in the same order.
    for (from, to) in [("p/a.png", "q/1.png"), ("p/sub/b.png", "q/2.png")] {
        place.write(to, &fs::read(place.path(from)).unwrap());
    }
    assert_eq!(open(&place, &at("q")), (pixels.clone(), false, String::new()));
    // Moved, and copied back into its place.
    fs::rename(place.path("p"), place.path("r")).unwrap();
    assert_eq!(open(&place, &at("r")), (pixels.clone(), false, String::new()));
    fs::rename(place.path("q"), place.path("p")).unwrap();
    assert_eq!(open(&place, &at("p")), (pixels.clone(), false, String::new()));
    cache_file(&place); // one for all
    // The same for a compressed file.
    let bytes = gzip(&idx([2, 8, 8], &pixels));
    for name in ["x.gz", "y.gz"] {
        place.write(name, &bytes);
    }
    assert!(open(&place, &place.config("x.gz")).1);
    assert_eq!(open(&place, &place.config("y.gz")), (pixels, false, String::new()));
}

#[test]
fn a_picture_that_is_left_out_is_named_where_it_lies_now() {
    let place = Place::new();
    save_picture(&place.path("p/a.png"), &[10; 64], 8, 8);
    place.write("p/b.png", b"bad");
    let skip = |name: &str| DataConfig {
        size: Some(ImageSize::square(8)),
        on_bad_image: OnBadImage::Skip,
        ..place.config(name)
    };
    Dataset::open(&skip("p"), None, &()).unwrap();
    fs::rename(place.path("p"), place.path("q")).unwrap();
    let log = Log::default();
    let dataset = Dataset::open(&skip("q"), None, &log).unwrap();
    assert!(!log.decoded());
    let expected = format!("{}: cannot be decoded", place.path("q/b.png").display());
    assert!(dataset.skipped_names()[0].starts_with(&expected), "{:?}", dataset.skipped_names());
}

#[test]
fn a_damaged_cache_is_built_again_loudly() {
    let place = Place::new();
    let pixels = noise(6 * 9 * 9, 3);
    place.write("x.gz", &gzip(&idx([6, 9, 9], &pixels)));
    let config = place.config("x.gz");
    assert!(open(&place, &config).1);
    let path = cache_file(&place);
    let good = fs::read(&path).unwrap();
    let payload = good.len() - pixels.len();
    let with = |at: usize, value: u8| {
        let mut bytes = good.clone();
        bytes[at] ^= value;
        bytes
    };
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("damaged (digest of the pixels)", with(payload + 77, 1)),
        ("damaged (digest of the pixels)", with(good.len() - 1, 0x80)),
        ("damaged (digest of the header)", with(60, 1)),
        ("not a data cache", with(0, 1)),
        ("version", with(8, 1)),
        ("length of the header", with(15, 0x7f)),
        ("bytes, expected", good[..good.len() - 1].to_vec()),
        ("bytes, expected", [&good[..], &[0]].concat()),
        ("bytes, expected", good[..payload].to_vec()),
        ("cannot be read", good[..20].to_vec()),
        ("cannot be read", Vec::new()),
    ];
    for (why, bytes) in cases {
        fs::write(&path, bytes).unwrap();
        let (found, decoded, notices) = open(&place, &config);
        assert_eq!((found, decoded), (pixels.clone(), true), "{why}");
        assert!(notices.contains(why) && notices.contains("built again"), "{why}: {notices}");
        assert_eq!(fs::read(&path).unwrap(), good, "{why}: the same cache again");
    }
    assert!(!open(&place, &config).1);
}

#[test]
fn many_can_build_at_once() {
    let place = Place::new();
    let pixels = noise(50 * 20 * 20, 4);
    place.write("x.gz", &gzip(&idx([50, 20, 20], &pixels)));
    let config = place.config("x.gz");
    let barrier = Barrier::new(4);
    let builders: usize = std::thread::scope(|scope| {
        let one = || {
            barrier.wait();
            let (found, decoded, _) = open(&place, &config);
            assert_eq!(found, pixels);
            usize::from(decoded)
        };
        let threads: Vec<_> = (0..4).map(|_| scope.spawn(one)).collect();
        threads.into_iter().map(|t| t.join().unwrap()).sum()
    });
    assert_eq!(builders, 1, "the others waited for the first");
    cache_file(&place);
    let left = fs::read_dir(place.path("cache"))
        .unwrap()
        .filter(|e| e.as_ref().unwrap().file_name().to_string_lossy().contains(".tmp-"));
    assert_eq!(left.count(), 0);
}

#[test]
fn an_unusable_cache_dir_is_an_error_and_leaves_nothing() {
    let place = Place::new();
    place.write("x.gz", &gzip(&idx([2, 3, 3], &noise(18, 1))));
    place.write("file", b"");
    for dir in ["file", "file/below"] {
        let config = DataConfig { cache_dir: Some(place.path(dir)), ..place.config("x.gz") };
        let error = Dataset::open(&config, None, &()).unwrap_err().to_string();
        let start = format!("data.cache_dir = {}: cannot create the directory: ", place.path(dir).display());
        assert!(error.starts_with(&start) && error.contains("writable"), "{error}");
    }
    // Bad data leaves no temporary file either.
    place.write("y.gz", &gzip(&idx([2, 3, 3], &noise(17, 1))));
    place.error("y.gz");
    let left: Vec<_> = fs::read_dir(place.path("cache")).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert!(left.iter().all(|name| name.to_string_lossy().ends_with(".lock")), "{left:?}");
}
