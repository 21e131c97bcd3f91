//! IDX, CIFAR-10 and NumPy files give the pixels that were written.

use sha2::{Digest, Sha256};

use super::*;

#[test]
fn one_array_in_every_container_is_the_same_data_set() {
    let place = Place::new();
    let pixels = noise(5 * 7 * 6, 1);
    let plain = idx([5, 7, 6], &pixels);
    let array = npy("|u1", "(5, 7, 6)", &pixels);
    let labels = npy("<i8", "(5,)", &[0; 40]);
    place.write("a-images-idx3-ubyte", &plain);
    place.write("a-images-idx3-ubyte.gz", &gzip(&plain));
    place.write("a.npy", &array);
    place.write("b.npy", &npy("|u1", "(5, 7, 6, 1)", &pixels));
    place.write("stored.npz", &npz(&[("arr_0.npy", array.clone())], false));
    place.write("deflated.npz", &npz(&[("labels.npy", labels.clone()), ("images.npy", array.clone())], true));
    place.write("first.npz", &npz(&[("x.npy", array), ("y.npy", labels)], true));
    let mut fingerprints = Vec::new();
    for (name, storage) in [
        ("a-images-idx3-ubyte", Storage::File),
        ("a.npy", Storage::File),
        ("b.npy", Storage::File),
        ("a-images-idx3-ubyte.gz", Storage::Cache),
        ("stored.npz", Storage::Cache),
        ("deflated.npz", Storage::Cache),
        ("first.npz", Storage::Cache),
    ] {
        let dataset = place.open(name).unwrap();
        assert_eq!((dataset.len(), dataset.shape(), dataset.storage()), (5, [7, 6, 1], storage), "{name}");
        assert_eq!(all(&dataset), pixels, "{name}");
        fingerprints.push(dataset.fingerprint());
    }
    fingerprints.dedup();
    assert_eq!(fingerprints.len(), 1, "{fingerprints:?}");
    assert_eq!(fingerprints[0].len(), 64);

    // One pixel, or the same bytes as another shape, make another data set.
    let mut changed = pixels.clone();
    changed[100] ^= 1;
    place.write("c.npy", &npy("|u1", "(5, 7, 6)", &changed));
    place.write("d.npy", &npy("|u1", "(5, 6, 7)", &pixels));
    assert_ne!(place.open("c.npy").unwrap().fingerprint(), fingerprints[0]);
    assert_ne!(place.open("d.npy").unwrap().fingerprint(), fingerprints[0]);
}

#[test]
fn colour_arrays_keep_their_channels() {
    let place = Place::new();
    let pixels = noise(4 * 5 * 3 * 3, 2);
    place.write("c.npy", &npy("|u1", "(4, 5, 3, 3)", &pixels));
    let dataset = place.open("c.npy").unwrap();
    assert_eq!((dataset.len(), dataset.shape(), dataset.image_bytes()), (4, [5, 3, 3], 45));
    assert_eq!(all(&dataset), pixels);
    let mut two = vec![0; 90];
    dataset.images(&[3, 1], &mut two).unwrap();
    assert_eq!(two, [&pixels[135..180], &pixels[45..90]].concat());
}

#[test]
fn cifar10_batches_are_one_data_set_in_order() {
    let place = Place::new();
    let pixels = noise(11 * 3072, 3);
    // Batches of unlike lengths show that image numbers are found by search and not by division.
    let mut images = pixels.chunks(3072).enumerate();
    for (batch, length) in [(1, 3), (2, 1), (3, 2), (4, 4), (5, 1)] {
        let records: Vec<u8> =
            images.by_ref().take(length).flat_map(|(i, image)| cifar_record(i as u8 % 10, image)).collect();
        place.write(&format!("cifar/cifar-10-batches-bin/data_batch_{batch}.bin"), &records);
    }
    place.write("cifar/cifar-10-batches-bin/test_batch.bin", b"not read");
    for name in ["cifar", "cifar/cifar-10-batches-bin"] {
        for format in [Format::Auto, Format::Cifar10] {
            let config = DataConfig { format, ..place.config(name) };
            let dataset = Dataset::open(&config, None, &()).unwrap();
            assert_eq!((dataset.len(), dataset.shape()), (11, [32, 32, 3]));
            assert_eq!(all(&dataset), pixels);
        }
    }
    let one = place.open("cifar/cifar-10-batches-bin/data_batch_3.bin").unwrap();
    assert_eq!((one.len(), all(&one)), (2, pixels[4 * 3072..6 * 3072].to_vec()));
    fs::remove_file(place.path("cifar/cifar-10-batches-bin/data_batch_2.bin")).unwrap();
    let error = place.error("cifar");
    assert!(error.contains("without data_batch_2.bin"), "{error}");
    place.write("python/data_batch_1", b"pickle");
    assert!(place.error("python").contains("Python version"));
}

#[test]
fn the_training_images_of_a_folder_are_chosen() {
    let place = Place::new();
    let train = noise(3 * 4 * 4, 4);
    place.write("mnist/t10k-images-idx3-ubyte", &idx([1, 4, 4], &noise(16, 5)));
    place.write("mnist/train-images-idx3-ubyte.gz", &gzip(&idx([3, 4, 4], &train)));
    place.write("mnist/train-labels-idx1-ubyte", &[0, 0, 8, 1, 0, 0, 0, 3, 1, 2, 3]);
    let log = Log::default();
    let dataset = Dataset::open(&place.config("mnist"), None, &log).unwrap();
    assert_eq!(all(&dataset), train);
    assert!(log.text().contains("train-images-idx3-ubyte.gz"), "{}", log.text());
    assert!(log.decoded());
    // The unpacked file goes before the packed one.
    place.write("mnist/train-images-idx3-ubyte", &idx([2, 4, 4], &train[..32]));
    assert_eq!(place.open("mnist").unwrap().len(), 2);

    place.write("emnist/emnist-letters-test-images-idx3-ubyte", &idx([1, 4, 4], &train[..16]));
    place.write("emnist/emnist-letters-train-images-idx3-ubyte", &idx([2, 4, 4], &train[..32]));
    assert_eq!(place.open("emnist").unwrap().len(), 2);
    place.write("emnist/emnist-digits-train-images-idx3-ubyte", &idx([3, 4, 4], &train));
    let error = place.error("emnist");
    assert!(error.contains("emnist-digits-train") && error.contains("emnist-letters-train"), "{error}");
    assert!(!error.contains("test"), "{error}");
    fs::create_dir(place.path("none")).unwrap();
    let config = DataConfig { format: Format::Idx, ..place.config("none") };
    assert!(Dataset::open(&config, None, &()).unwrap_err().to_string().contains("train-images-idx3-ubyte"));

    place.write("numpy/x.npy", &npy("|u1", "(3, 4, 4)", &train));
    assert_eq!(all(&place.open("numpy").unwrap()), train);
}

#[test]
fn the_archive_member_with_the_images_is_chosen_and_named() {
    let place = Place::new();
    let (train, test) = (noise(32, 6), noise(16, 7));
    let members = [
        ("x_test.npy", npy("|u1", "(1, 4, 4)", &test)),
        ("y_train.npy", npy("|u1", "(2,)", &[1, 2])),
        ("x_train.npy", npy("|u1", "(2, 4, 4)", &train)),
    ];
    place.write("mnist.npz", &npz(&members, true));
    let log = Log::default();
    let dataset = Dataset::open(&place.config("mnist.npz"), None, &log).unwrap();
    assert_eq!(all(&dataset), train);
    assert!(log.text().contains("x_train.npy of x_test.npy"), "{}", log.text());
}

/// The file in `data/` that the quick start trains on.
#[test]
fn the_shipped_images_are_those_of_the_debian_package() {
    let place = Place::new();
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("data/fashion-mnist-10k/t10k-images-idx3-ubyte.gz");
    let packed = fs::read(&path).unwrap();
    assert_eq!(packed.len(), 4_422_079);
    let hash: String = Sha256::digest(&packed).iter().map(|b| format!("{b:02x}")).collect();
    assert_eq!(hash, "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa");
    let config = DataConfig { path, size: Some(ImageSize::square(28)), channels: Some(1), ..place.config("") };
    let dataset = Dataset::open(&config, None, &()).unwrap();
    assert_eq!((dataset.len(), dataset.shape(), dataset.storage()), (10_000, [28, 28, 1], Storage::Cache));
    // Sums of the unpacked file's bytes, computed with zcat and awk.
    let sum = |image: u64| {
        let mut out = vec![0; 784];
        dataset.image(image, &mut out).unwrap();
        out.iter().map(|p| u64::from(*p)).sum::<u64>()
    };
    assert_eq!([sum(0), sum(1), sum(5000), sum(9999)], [33_456, 100_994, 86_069, 24_390]);
    let total: u64 = all(&dataset).iter().map(|p| u64::from(*p)).sum();
    assert_eq!(total, 573_469_082);
}
