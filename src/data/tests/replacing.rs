//! Pictures whose headers are good and whose bodies are not, where pictures are decoded when they are needed.

use std::sync::Arc;

use super::*;

/// Eight grey pictures of 8×8, the one at place i of value 10·(i + 1); those in `bad` cut in their bodies.
fn place(bad: &[usize]) -> (Place, DataConfig) {
    let place = Place::new();
    for i in 0..8 {
        let path = place.path(&format!("p/{i}.png"));
        // Noise in the lower half, so that there is a body to cut.
        let mut pixels = vec![10 * (i as u8 + 1); 64];
        pixels[32..].copy_from_slice(&noise(32, i as u32));
        save_picture(&path, &pixels, 8, 8);
        if bad.contains(&i) {
            let bytes = fs::read(&path).unwrap();
            fs::write(&path, &bytes[..bytes.len() - 25]).unwrap();
        }
    }
    let config = DataConfig {
        size: Some(ImageSize::square(8)),
        channels: Some(1),
        cache_limit: ByteSize(0),
        on_bad_image: OnBadImage::Skip,
        ..place.config("p")
    };
    (place, config)
}

/// The first pixel of image i.
fn value(dataset: &Dataset, i: u64) -> u8 {
    let mut out = [0; 64];
    dataset.image(i, &mut out).unwrap();
    out[0]
}

#[test]
fn the_next_good_picture_stands_in_for_a_bad_one() {
    let (_place, config) = place(&[2, 3, 7]);
    let open = || Dataset::open(&config, None, &()).unwrap();
    let expected = [10, 20, 50, 50, 50, 60, 70, 10]; // 2 and 3 become 4, 7 becomes 0
    // Whatever is asked for first, and whatever was asked for before.
    for order in [[0, 1, 2, 3, 4, 5, 6, 7], [7, 6, 5, 4, 3, 2, 1, 0], [3, 7, 2, 0, 3, 7, 2, 5]] {
        let dataset = open();
        assert_eq!((dataset.len(), dataset.skipped(), dataset.replaced()), (8, 0, 0));
        for i in order {
            assert_eq!(value(&dataset, i), expected[i as usize], "image {i} in {order:?}");
        }
        assert_eq!(dataset.replaced(), 3);
        let mut news = dataset.replacements();
        news.sort_unstable();
        assert_eq!(news.len(), 3, "each is told once: {news:?}");
        for (text, name) in news.iter().zip(["2.png", "3.png", "7.png"]) {
            let is_clear = text.contains(name) && text.contains("cannot be decoded") && text.contains("stands in");
            assert!(is_clear && !text.contains("on_bad_image"), "{text}");
        }
        assert_eq!(dataset.replacements(), [""; 0]);
    }
    // Many threads at once, as the loader does it.
    let dataset = Arc::new(open());
    let order = Order { seed: 3, len: 8 };
    let slice = LoaderConfig { batch: 8, offset: 0, count: 8, start: 0, depth: 2 };
    let mut loader = Loader::new(dataset.clone(), order, slice).unwrap();
    for step in 0..20 {
        let found: Vec<u8> = loader.next().unwrap().pixels.chunks(64).map(|image| image[0]).collect();
        let wanted: Vec<u8> = (0..8).map(|j| expected[order.index(step * 8 + j) as usize]).collect();
        assert_eq!(found, wanted);
    }
    assert_eq!((dataset.replaced(), dataset.replacements().len()), (3, 3));
}

#[test]
fn without_skipping_a_bad_body_is_an_error() {
    let (_place, config) = place(&[2]);
    let config = DataConfig { on_bad_image: OnBadImage::Error, ..config };
    let dataset = Dataset::open(&config, None, &()).unwrap();
    assert_eq!(value(&dataset, 1), 20);
    let error = dataset.image(2, &mut [0; 64]).unwrap_err().to_string();
    assert!(error.contains("2.png") && error.contains("on_bad_image"), "{error}");
    assert_eq!(dataset.replaced(), 0);
}

#[test]
fn a_folder_of_bad_bodies_ends_the_search() {
    let (_place, config) = place(&[0, 1, 2, 3, 4, 5, 6, 7]);
    let dataset = Dataset::open(&config, None, &()).unwrap();
    for i in [5, 0] {
        let error = dataset.image(i, &mut [0; 64]).unwrap_err().to_string();
        assert!(error.contains("8 pictures, none of them usable"), "{error}");
    }
    // Five by name, then when their number has doubled: at eight.
    let news = dataset.replacements();
    assert_eq!(news.len(), 6, "{news:?}");
    assert!(news[5].contains("8 pictures could not be decoded so far"), "{news:?}");
}
