//! Opening a data set ends when its caller says so, and leaves nothing half done.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use super::*;

/// Says stop from the nth time on that it is asked.
struct StopAt {
    at: usize,
    asked: AtomicUsize,
}

impl Progress for StopAt {
    fn update(&self, _: Phase, _: u64, _: u64) {}
    fn notice(&self, _: &str) {}
    fn stopped(&self) -> bool {
        self.asked.fetch_add(1, Ordering::Relaxed) >= self.at
    }
}

fn pixel_files(place: &Place) -> Vec<String> {
    let entries = fs::read_dir(place.path("cache")).into_iter().flatten();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name.contains(".pixels")).collect()
}

#[test]
fn wherever_it_is_when_it_is_stopped() {
    let place = Place::new();
    let pixels = noise(40 * 30 * 30, 1);
    for i in 0..10 {
        save_picture(&place.path(&format!("p/{i}.png")), &pixels[i * 900..][..900], 30, 30);
    }
    place.write("x.gz", &gzip(&idx([40, 30, 30], &pixels)));
    place.write("x.npy", &npy("|u1", "(40, 30, 30)", &pixels));
    place.write("x.bin", &cifar_record(1, &noise(3072, 2)));
    let pictures = DataConfig { size: Some(ImageSize::square(30)), channels: Some(1), ..place.config("p") };
    let on_demand = DataConfig { cache_limit: ByteSize(0), ..pictures.clone() };
    let configs = [place.config("x.npy"), place.config("x.bin"), on_demand, place.config("x.gz"), pictures];
    for config in &configs {
        let mut stopped = 0;
        let whole = (0..).find_map(|at| {
            let progress = StopAt { at, asked: AtomicUsize::new(0) };
            match Dataset::open(config, None, &progress) {
                Err(DataError::Stopped) => {
                    stopped += 1;
                    assert!(pixel_files(&place).iter().all(|name| !name.contains("tmp")), "{config:?} at {at}");
                    None
                }
                result => Some(result.unwrap()),
            }
        });
        assert!(stopped >= 1, "{config:?} was never asked");
        assert_eq!(all(&whole.unwrap()), all(&Dataset::open(config, None, &()).unwrap()));
    }
    assert_eq!(pixel_files(&place).len(), 2);
}

#[test]
fn while_another_process_builds_the_cache() {
    struct Patient {
        waits: AtomicBool,
    }
    impl Progress for Patient {
        fn update(&self, _: Phase, _: u64, _: u64) {}
        fn notice(&self, message: &str) {
            assert!(message.contains("waiting"), "{message}");
            self.waits.store(true, Ordering::Relaxed);
        }
        fn stopped(&self) -> bool {
            self.waits.load(Ordering::Relaxed)
        }
    }
    let place = Place::new();
    place.write("x.gz", &gzip(&idx([4, 3, 3], &noise(36, 1))));
    place.open("x.gz").unwrap();
    let name = pixel_files(&place).remove(0);
    let path = place.path(&format!("cache/{name}"));
    fs::remove_file(&path).unwrap();
    // The other process.
    let lock = fs::File::options().write(true).open(path.with_extension("lock")).unwrap();
    lock.lock().unwrap();
    let start = Instant::now();
    let found = Dataset::open(&place.config("x.gz"), None, &Patient { waits: false.into() });
    assert!(matches!(found, Err(DataError::Stopped)), "{found:?}");
    assert!(start.elapsed() < Duration::from_secs(30));
    // It goes away: whoever waits, goes on.
    let open = std::thread::scope(|scope| {
        let waiting = scope.spawn(|| place.open("x.gz").map(|dataset| all(&dataset)));
        std::thread::sleep(Duration::from_millis(50));
        drop(lock);
        waiting.join().unwrap()
    });
    assert_eq!(open.unwrap(), noise(36, 1));
}
