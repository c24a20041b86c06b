// The corpus of the fuzzers and thousands of seeded mutations of it, through the readers: each is
// read or refused, in the ordinary build and under sanitizers.

#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

#include "fatbin/fatbin.h"
#include "ptx/cfg.h"
#include "ptx/parser.h"
#include "support/elf_builder.h"
#include "support/fatbin_builder.h"

namespace gpu_emulator {
namespace {

struct File {
  std::string name, bytes;
};

std::vector<File> corpus(const std::string& extension) {
  std::vector<File> files;
  for (const auto& entry :
       std::filesystem::directory_iterator(std::string(GPU_EMULATOR_TESTS) + "/corpus")) {
    if (entry.path().extension() != extension) continue;
    std::ifstream stream(entry.path(), std::ios::binary);
    files.push_back({entry.path().filename().string(),
                     std::string(std::istreambuf_iterator<char>(stream), {})});
  }
  std::sort(files.begin(), files.end(),
            [](const File& a, const File& b) { return a.name < b.name; });
  return files;
}

class Mutator {
 public:
  Mutator(std::vector<File> files, uint64_t seed) : files_(std::move(files)), random_(seed) {}

  std::string next() {
    std::string text = pick().bytes;
    for (size_t i = 1 + random_() % 4; i > 0 && !text.empty(); --i) mutate(text);
    return text;
  }

 private:
  const File& pick() { return files_[random_() % files_.size()]; }

  void mutate(std::string& text) {
    const size_t at = random_() % text.size();
    const size_t length = std::min<size_t>(text.size() - at, 1 + random_() % 40);
    const std::string& other = pick().bytes;
    switch (random_() % 6) {
      case 0:
        text.resize(at);
        break;
      case 1:
        text[at] = static_cast<char>(text[at] ^ 1 << random_() % 8);
        break;
      case 2:
        text[at] = static_cast<char>(random_());
        break;
      case 3:
        text.erase(at, length);
        break;
      case 4:
        text.insert(at, text.substr(random_() % text.size(), length));
        break;
      default:
        text.replace(at, length, other.substr(random_() % other.size(), length));
    }
  }

  std::vector<File> files_;
  std::mt19937_64 random_;
};

bool reads_ptx(const std::string& text) {
  try {
    const ptx::Module module = ptx::parse(text);
    for (const ptx::Function& function : module.functions) ptx::reconvergence_points(function);
    return true;
  } catch (const ptx::ParseError&) {
    return false;
  }
}

bool reads_fatbin(const std::string& bytes) {
  try {
    fatbin::best_ptx(std::as_bytes(std::span(bytes)), 9, 0);
    return true;
  } catch (const fatbin::FatbinError&) {
    return false;
  }
}

TEST(Corpus, PtxIsRead) {
  const std::vector<File> files = corpus(".ptx");
  EXPECT_GE(files.size(), 3u);
  for (const File& file : files) EXPECT_NO_THROW(ptx::parse(file.bytes)) << file.name;
}

TEST(Corpus, MutatedPtxIsReadOrRefused) {
  Mutator mutator(corpus(".ptx"), 1);
  int read = 0, refused = 0;
  for (int i = 0; i < 3000; ++i) (reads_ptx(mutator.next()) ? read : refused) += 1;
  EXPECT_GT(read, 30);
  EXPECT_GT(refused, 1000);
}

TEST(Corpus, FatbinsAreRead) {
  for (const File& file : corpus(".fatbin")) {
#if !GPU_EMULATOR_HAVE_ZSTD
    if (file.name == "zstd.fatbin") continue;
#endif
    const fatbin::Bytes bytes = std::as_bytes(std::span(file.bytes));
    for (const auto& [major, target] : {std::pair{8, "sm_80"}, std::pair{9, "sm_90a"}}) {
      const std::string ptx = fatbin::best_ptx(bytes, major, 0);
      EXPECT_EQ(fatbin::target_of(ptx), target) << file.name;
      const ptx::Module module = ptx::parse(ptx);
      ASSERT_EQ(module.functions.size(), 2u) << file.name;
      EXPECT_TRUE(module.functions[0].has_body);
    }
  }
}

TEST(Corpus, MutatedFatbinsAreReadOrRefused) {
  Mutator mutator(corpus(".fatbin"), 2);
  int read = 0, refused = 0;
  for (int i = 0; i < 10000; ++i) (reads_fatbin(mutator.next()) ? read : refused) += 1;
  EXPECT_GT(read, 100);
  EXPECT_GT(refused, 1000);
}

TEST(Corpus, MutatedElfFilesAreReadOrRefused) {
  testing_support::FatbinBuilder builder;
  builder.add_ptx(80, ".version 9.0\n.target sm_80\n");
  Mutator mutator({{"elf", testing_support::elf_with_fatbins(builder.bytes())}}, 3);
  int read = 0;
  int refused = 0;
  for (int i = 0; i < 10000; ++i) {
    const std::string bytes = mutator.next();
    try {
      for (fatbin::Bytes found : fatbin::embedded_fatbins(std::as_bytes(std::span(bytes)))) {
        read += reads_fatbin({reinterpret_cast<const char*>(found.data()), found.size()});
      }
    } catch (const fatbin::FatbinError&) {
      ++refused;
    }
  }
  EXPECT_GT(read, 100);
  EXPECT_GT(refused, 500);
}

}  // namespace
}  // namespace gpu_emulator
