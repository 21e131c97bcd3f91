//! A loader gives the images that direct access gives, whatever the rank, the start and the storage.

use std::sync::Arc;

use super::*;

fn dataset(place: &Place, n: usize) -> Arc<Dataset> {
    place.write("x.npy", &npy("|u1", &format!("({n}, 3, 2, 1)"), &noise(n * 6, 8)));
    Arc::new(place.open("x.npy").unwrap())
}

/// The pixels of images `offset..offset + count` of the batch of `step`, read one by one.
fn direct(dataset: &Dataset, order: Order, config: &LoaderConfig, step: u64) -> Vec<u8> {
    let image = dataset.image_bytes();
    let mut out = vec![0; config.count * image];
    for (j, out) in out.chunks_mut(image).enumerate() {
        let position = step * config.batch as u64 + (config.offset + j) as u64;
        dataset.image(order.index(position), out).unwrap();
    }
    out
}

#[test]
fn batches_are_those_of_the_order_across_epochs_and_after_a_resume() {
    let place = Place::new();
    let data = dataset(&place, 23); // not a multiple of the batch: batches run across epochs
    let order = Order { seed: 5, len: 23 };
    for (offset, count, start) in [(0, 8, 0), (2, 3, 0), (7, 1, 0), (0, 8, 5), (2, 3, 1_000_003)] {
        for depth in [1, 3] {
            let config = LoaderConfig { batch: 8, offset, count, start, depth };
            let mut loader = Loader::new(data.clone(), order, config).unwrap();
            for step in start..start + 9 {
                let batch = loader.next().unwrap();
                assert_eq!(batch.step, step);
                assert_eq!(batch.pixels, direct(&data, order, &config, step), "step {step} of {config:?}");
            }
        }
    }
}

#[test]
fn nothing_is_dropped_or_repeated_within_an_epoch() {
    let place = Place::new();
    let n = 20;
    let pixels: Vec<u8> = (0..n as u8).flat_map(|i| [i; 6]).collect();
    place.write("x.npy", &npy("|u1", "(20, 3, 2, 1)", &pixels));
    let data = Arc::new(place.open("x.npy").unwrap());
    // Two ranks with a batch of 8: five steps are two epochs.
    let mut seen = Vec::new();
    let config = |offset| LoaderConfig { batch: 8, offset, count: 4, start: 0, depth: 2 };
    let order = Order { seed: 1, len: n };
    let mut ranks = [0, 4].map(|offset| Loader::new(data.clone(), order, config(offset)).unwrap());
    for _ in 0..5 {
        for rank in &mut ranks {
            seen.extend(rank.next().unwrap().pixels.chunks(6).map(|image| image[0]));
        }
    }
    for epoch in seen.chunks_mut(n as usize) {
        epoch.sort_unstable();
        assert_eq!(epoch, (0..n as u8).collect::<Vec<_>>());
    }
}

#[test]
fn buffers_are_used_again() {
    let place = Place::new();
    let data = dataset(&place, 10);
    let config = LoaderConfig { batch: 4, offset: 0, count: 4, start: 0, depth: 2 };
    let mut loader = Loader::new(data, Order { seed: 0, len: 10 }, config).unwrap();
    let mut addresses: Vec<*const u8> = (0..50).map(|_| loader.next().unwrap().pixels.as_ptr()).collect();
    addresses.sort_unstable();
    addresses.dedup();
    assert!(addresses.len() <= 3, "{} buffers", addresses.len());
}

#[test]
fn a_loader_can_be_dropped_at_any_time() {
    let place = Place::new();
    let data = dataset(&place, 10);
    for taken in 0..6 {
        let config = LoaderConfig { batch: 4, offset: 0, count: 4, start: 0, depth: 2 };
        let mut loader = Loader::new(data.clone(), Order { seed: 0, len: 10 }, config).unwrap();
        for _ in 0..taken {
            loader.next().unwrap();
        }
        drop(loader);
        assert_eq!(Arc::strong_count(&data), 1, "the thread has ended");
    }
}

#[test]
fn impossible_slices_are_refused() {
    let place = Place::new();
    let data = dataset(&place, 10);
    for (batch, offset, count) in [(8, 0, 0), (8, 5, 4), (8, usize::MAX, 2), (0, 0, 1)] {
        let config = LoaderConfig { batch, offset, count, start: 0, depth: 2 };
        let error = Loader::new(data.clone(), Order { seed: 0, len: 10 }, config).map(drop).unwrap_err();
        assert!(matches!(error, DataError::Slice { .. }), "{error}");
    }
}

#[test]
fn pictures_decoded_on_demand_are_those_of_the_cache_and_errors_reach_the_caller() {
    let place = Place::new();
    let n = 12;
    for i in 0..n {
        save_picture(&place.path(&format!("p/{i:02}.png")), &noise(20 * 16 * 3, i), 16, 20);
    }
    let cached = DataConfig { size: Some(ImageSize { height: 8, width: 9 }), ..place.config("p") };
    let lazy = DataConfig { cache_limit: ByteSize(n as u64 * 8 * 9 * 3 - 1), ..cached.clone() };
    let log = Log::default();
    let cached = Arc::new(Dataset::open(&cached, None, &()).unwrap());
    let lazy = Arc::new(Dataset::open(&lazy, None, &log).unwrap());
    assert_eq!((cached.storage(), lazy.storage()), (Storage::Cache, Storage::OnDemand));
    assert!(log.updates.lock().unwrap().contains(&(Phase::Check, 12, 12)));
    assert_eq!(cached.fingerprint(), lazy.fingerprint());
    assert_eq!(all(&cached), all(&lazy));
    let order = Order { seed: 2, len: n as u64 };
    let config = LoaderConfig { batch: 5, offset: 1, count: 4, start: 3, depth: 2 };
    let mut loader = Loader::new(lazy.clone(), order, config).unwrap();
    for step in 3..12 {
        assert_eq!(loader.next().unwrap().pixels, direct(&cached, order, &config, step));
    }
    drop(loader);

    // A picture is damaged while the run is on.
    place.write("p/07.png", b"gone bad");
    let mut loader = Loader::new(lazy, order, config).unwrap();
    let error = loop {
        match loader.next() {
            Ok(batch) => assert!(batch.step < 9, "all images have been visited"),
            Err(error) => break error.to_string(),
        }
    };
    assert!(error.contains("07.png"), "{error}");
    assert!(matches!(loader.next(), Err(DataError::LoaderEnded)));
}
