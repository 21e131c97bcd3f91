//! Everything that can be wrong with a data set is refused by a message that names the file and says what to do.

use proptest::prelude::*;

use super::*;

/// Writes `bytes`, opens them and requires an error that names the file and has every one of `parts`.
fn refused(name: &str, bytes: &[u8], parts: &[&str]) {
    let place = Place::new();
    place.write(name, bytes);
    let error = place.error(name);
    for part in [&[name], parts].concat() {
        assert!(error.contains(part), "{name}: {part:?} is not in {error:?}");
    }
}

#[test]
fn idx_files() {
    let good = idx([2, 3, 3], &noise(18, 1));
    let name = "train-images-idx3-ubyte";
    refused(name, &good[..33], &["33 bytes", "expected 34", "cut short", "again"]);
    refused(name, &[&good[..], &[0]].concat(), &["35 bytes", "expected 34", "after its end"]);
    refused(name, &good[..10], &["10 bytes", "expected 16"]);
    refused(name, b"", &["0 bytes", "00 00 08 03"]);
    refused(name, &idx([0, 28, 28], &[]), &["no images"]);
    refused(name, &idx([1 << 30, 28, 28], &[1; 100]), &["116 bytes", "expected 841813590032"]);
    refused(name, &idx([u32::MAX; 3], &[1; 100]), &["claims a shape", "4294967295"]);
    refused(name, &[0, 0, 8, 1, 0, 0, 0, 2, 1, 2], &["file of labels", "images-idx3-ubyte"]);
    refused(name, &[0, 0, 0x0d, 3, 0, 0, 0, 2, 1, 2], &["f32", "expected unsigned bytes"]);
    refused(name, b"<!DOCTYPE html>", &["3c 21 44 4f", "00 00 08 03"]);
}

#[test]
fn compressed_idx_files() {
    let name = "train-images-idx3-ubyte.gz";
    let plain = idx([40, 30, 30], &noise(36_000, 1));
    let good = gzip(&plain);
    refused(name, &gzip(&plain[..36_015]), &["36015 bytes", "expected 36016", "cut short"]);
    refused(name, &gzip(&[&plain[..], &[1, 2]].concat()), &["36018 bytes", "expected 36016"]);
    refused(name, &good[..good.len() / 2], &["compressed", "cut short"]);
    refused(name, &good[..good.len() - 3], &["compressed", "cut short"]);
    let mut flipped = good.clone();
    flipped[good.len() - 6] ^= 1; // in the checksum
    refused(name, &flipped, &["damaged"]);
    refused(name, b"<html>not found</html>", &["compressed file", "gzip"]);
    refused(name, b"", &["compressed file"]);
    refused(name, &gzip(b""), &["00 00 08 03"]);
    // A header that lies is found out before anything is unpacked or allocated, also where cache_limit would allow it.
    refused(name, &gzip(&idx([1 << 24, 20, 20], &[7; 400])), &["compressed bytes cannot hold", "16777216"]);
    refused(name, &gzip(&idx([1, 2000, 20], &[7; 100])), &["116 bytes", "expected 40016"]);
}

#[test]
fn numpy_files() {
    let pixels = noise(18, 1);
    let good = npy("|u1", "(2, 3, 3)", &pixels);
    let length = good.len();
    refused("a.npy", &good[..length - 1], &[&format!("{} bytes", length - 1), &format!("expected {length}")]);
    refused("a.npy", &[&good[..], &[0]].concat(), &["after its end"]);
    refused("a.npy", &good[..40], &["40 bytes"]);
    refused("a.npy", b"", &["\\x93NUMPY"]);
    refused("a.npy", &npy("<f4", "(2, 3, 3)", &[0; 72]), &["<f4", "expected unsigned bytes", "astype"]);
    refused("a.npy", &npy("|u1", "(2, 3)", &[0; 6]), &["[2, 3]", "[N, H, W"]);
    refused("a.npy", &npy("|u1", "(2, 3, 3, 2)", &[0; 36]), &["[2, 3, 3, 2]", "C = 1"]);
    refused("a.npy", &npy("|u1", "(2, 3, 8, 8)", &[0; 384]), &["transpose"]);
    refused("a.npy", &npy("|u1", "(0, 3, 3)", &[]), &["no images"]);
    refused("a.npy", &npy("|u1", "(9223372036854775807, 1, 1)", &[0; 9]), &["claims a shape"]);
    refused("a.npy", &npy("|u1", "(9000000000000000000, 1, 1)", &[0; 9]), &["expected 9000000000000000"]);
    let fortran = String::from_utf8_lossy(&good[10..128]).replace("False", "True ");
    refused("a.npy", &[&good[..10], fortran.as_bytes(), &pixels].concat(), &["fortran_order", "ascontiguousarray"]);

    let archive = npz(&[("arr_0.npy", good.clone())], true);
    refused("a.npz", &archive[..archive.len() - 10], &["zip archive", "damaged"]);
    refused("a.npz", b"not a zip", &["zip archive"]);
    refused("a.npz", b"", &["zip archive"]);
    refused("a.npz", &npz(&[("readme.txt", b"hello".to_vec())], true), &["none of them an array", "savez"]);
    refused("a.npz", &npz(&[], true), &["0 members"]);
    refused("a.npz", &npz(&[("arr_0.npy", good[..length - 2].to_vec())], true), &["cut short"]);
    refused("a.npz", &npz(&[("arr_0.npy", npy("<f8", "(2, 3, 3)", &[0; 144]))], true), &["<f8"]);
    refused("a.npz", &npz(&[("x.npy", npy("|u1", "(99999999, 3, 3)", &pixels))], true), &["cannot hold"]);
    // A bit of the stored pixels flips: the archive's checksum tells.
    let mut stored = npz(&[("arr_0.npy", good)], false);
    let at = stored.windows(18).position(|w| w == pixels).unwrap();
    stored[at] ^= 1;
    refused("a.npz", &stored, &["damaged"]);
}

#[test]
fn cifar10_files() {
    let record = cifar_record(3, &noise(3072, 1));
    refused("data_batch_1.bin", &record[..3000], &["3000 bytes", "multiple of 3073", "again"]);
    refused("data_batch_1.bin", b"", &["no images"]);
    let wrong = cifar_record(77, &noise(3072, 1));
    refused("data_batch_1.bin", &[record, wrong].concat(), &["record 1", "label 77", "0 to 9"]);
}

#[test]
fn other_things() {
    refused("a.txt", b"hello", &["IDX", "data.format"]);
    refused("a.png", b"\x89PNG\r\n\x1a\n", &["a folder of pictures"]);
    let place = Place::new();
    fs::create_dir(place.path("empty")).unwrap();
    let sized = |name: &str| DataConfig { size: Some(ImageSize::square(8)), ..place.config(name) };
    let error = |config: &DataConfig| Dataset::open(config, None, &()).unwrap_err().to_string();
    let text = error(&sized("empty"));
    assert!(text.contains("no images") && text.contains(".png"), "{text}");
    let text = error(&place.config("empty"));
    assert!(text.contains("data.size"), "{text}");
    let text = error(&sized("nowhere/mnist"));
    assert!(text.contains("no data set at") && text.contains("train-images-idx3-ubyte.gz"), "{text}");
    place.write("a.npy", &npy("|u1", "(2, 3, 3)", &noise(18, 1)));
    let text = error(&sized("a.npy"));
    assert!(text.contains("images of 3×3 with 1 channel") && text.contains("data.size = 8×8"), "{text}");
    let text = error(&DataConfig { channels: Some(3), ..place.config("a.npy") });
    assert!(text.contains("data.channels = 3"), "{text}");
    let text = error(&DataConfig { format: Format::Images, ..sized("a.npy") });
    assert!(text.contains("folder of PNG or JPEG"), "{text}");
    place.write("b.npz", &npz(&[("x.npy", npy("|u1", "(2, 3, 3)", &noise(18, 1)))], true));
    let text = error(&DataConfig { cache_limit: ByteSize(17), ..place.config("b.npz") });
    assert!(text.contains("18 bytes") && text.contains("data.cache_limit = 17"), "{text}");
    assert!(text.contains("unpack"), "{text}");
}

#[test]
fn what_is_neither_file_nor_folder() {
    let place = Place::new();
    pipe(&place.path("pipe"));
    fs::create_dir(place.path("d")).unwrap();
    pipe(&place.path("d/x.npy"));
    for format in [Format::Auto, Format::Idx, Format::Npy, Format::Cifar10, Format::Images] {
        for (name, config) in [("pipe", place.config("pipe")), ("d/x.npy", place.config("d/x.npy"))] {
            let error = Dataset::open(&DataConfig { format, ..config }, None, &()).unwrap_err().to_string();
            assert!(error.contains(name) && error.contains("a named pipe, expected a regular file"), "{error}");
        }
    }
    let error = place.error("d");
    assert!(error.contains("x.npy") && error.contains("a named pipe"), "{error}");
    let device = DataConfig { path: "/dev/zero".into(), ..place.config("x") };
    let error = Dataset::open(&device, None, &()).unwrap_err().to_string();
    assert!(error.contains("/dev/zero: a device, expected"), "{error}");
}

#[test]
fn an_array_among_pictures_is_not_guessed_about() {
    let place = Place::new();
    save_picture(&place.path("p/a.png"), &[7; 64], 8, 8);
    place.write("p/features.npy", &npy("|u1", "(2, 8, 8)", &noise(128, 1)));
    let config = DataConfig { size: Some(ImageSize::square(8)), channels: Some(1), ..place.config("p") };
    let open = |format| Dataset::open(&DataConfig { format, ..config.clone() }, None, &());
    let error = open(Format::Auto).unwrap_err().to_string();
    assert!(error.contains("features.npy") && error.contains("data.format = \"images\" or \"npy\""), "{error}");
    assert_eq!(open(Format::Images).unwrap().len(), 1);
    assert_eq!(open(Format::Npy).unwrap().len(), 2);
    // Where pictures may lie deeper, the array is taken, and what else could be is said.
    fs::create_dir(place.path("p/more")).unwrap();
    fs::rename(place.path("p/a.png"), place.path("p/more/a.png")).unwrap();
    let log = Log::default();
    assert_eq!(Dataset::open(&config, None, &log).unwrap().len(), 2);
    assert!(log.text().contains("features.npy") && log.text().contains("data.format = \"images\""), "{}", log.text());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_damaged_file_of_any_format_never_panics(
        which in 0usize..5, at in any::<prop::sample::Index>(), value in any::<u8>(), cut in any::<prop::sample::Index>(),
        shorten in any::<bool>(),
    ) {
        let pixels = noise(2 * 3 * 4, 9);
        let array = npy("|u1", "(2, 3, 4)", &pixels);
        let (name, mut bytes) = match which {
            0 => ("x-idx3-ubyte", idx([2, 3, 4], &pixels)),
            1 => ("x-idx3-ubyte.gz", gzip(&idx([2, 3, 4], &pixels))),
            2 => ("x.npy", array),
            3 => ("x.npz", npz(&[("arr_0.npy", array)], true)),
            _ => ("x.bin", cifar_record(1, &noise(3072, 2))),
        };
        let at = at.index(bytes.len());
        bytes[at] = value;
        if shorten {
            bytes.truncate(cut.index(bytes.len()));
        }
        let place = Place::new();
        place.write(name, &bytes);
        match place.open(name) {
            Ok(dataset) => {
                all(&dataset);
            }
            Err(error) => prop_assert!(error.to_string().contains(name)),
        }
    }
}
