#include "files/safetensors.h"

#include <fmt/format.h>
#include <fovea/error.h>
#include <gtest/gtest.h>

#include <barrier>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <random>
#include <sstream>
#include <thread>

#include "tests/support.h"
#include "tools/npy.h"

namespace fovea::tools {
namespace {

using test::contains;
using test::refusal;

/// A folder of its own for each test, gone with it.
class Folder {
 public:
  Folder() {
    std::string name = (std::filesystem::temp_directory_path() / "fovea_XXXXXX").string();
    if (::mkdtemp(name.data()) == nullptr) throw std::runtime_error("no temporary folder");
    path_ = name;
  }
  ~Folder() { std::filesystem::remove_all(path_); }
  [[nodiscard]] std::string file(const std::string& name) const { return (path_ / name).string(); }
  [[nodiscard]] std::size_t count() const {
    return static_cast<std::size_t>(std::distance(std::filesystem::directory_iterator(path_), {}));
  }

 private:
  std::filesystem::path path_;
};

std::string little_endian(std::uint64_t value, int bytes) {
  std::string text;
  for (int i = 0; i < bytes; ++i) text += static_cast<char>(value >> (8 * i));
  return text;
}

std::string safetensors(const std::string& header, const std::string& data) {
  return little_endian(header.size(), 8) + header + data;
}

files::SafetensorsFile parse(const std::string& bytes) {
  return {std::make_unique<std::istringstream>(bytes), bytes.size(), "name.safetensors"};
}

std::string npy(const std::string& dictionary, const std::string& data, int version = 1) {
  return "\x93NUMPY" + little_endian(static_cast<std::uint64_t>(version), 2) +
         little_endian(dictionary.size(), version == 1 ? 2 : 4) + dictionary + data;
}

files::OwnedTensor parse_npy(const std::string& bytes) {
  std::istringstream stream(bytes);
  return read_npy(stream, bytes.size(), "name.npy");
}

std::string text_of(const files::OwnedTensor& tensor) {
  return {reinterpret_cast<const char*>(tensor.bytes().data()), tensor.bytes().size()};
}

std::string random_bytes(std::size_t count, std::uint64_t seed) {
  std::mt19937_64 random(seed);
  std::string bytes(count, '\0');
  for (char& byte : bytes) byte = static_cast<char>(random());
  return bytes;
}

TEST(Safetensors, WhatIsWrittenReadsBack) {
  const Folder folder;
  const std::string path = folder.file("a.safetensors");
  for (std::uint64_t seed = 0; seed < 50; ++seed) {
    std::mt19937_64 random(seed);
    std::vector<files::OwnedTensor> owned;
    std::vector<std::pair<std::string, Tensor>> named;
    for (int n = 0; n < 4; ++n) {
      constexpr DType kTypes[] = {DType::kFloat32, DType::kFloat16, DType::kBFloat16, DType::kInt32, DType::kBool};
      std::vector<std::int64_t> shape(1 + random() % 4);
      for (auto& extent : shape) extent = static_cast<std::int64_t>(random() % 6);
      const DType dtype = kTypes[random() % 5];
      owned.emplace_back(dtype, shape);
      for (std::byte& byte : owned.back().bytes()) {
        byte = static_cast<std::byte>(random() % (dtype == DType::kBool ? 2 : 256));
      }
      named.emplace_back(fmt::format("tensor \"{}\"", n), owned.back().view());
    }
    const std::map<std::string, std::string> metadata{{"tokens", "[\"a\", \"ü\"]"}};
    files::write_safetensors(path, named, metadata);
    const files::SafetensorsFile file = files::SafetensorsFile::open(path);
    EXPECT_EQ(file.metadata(), metadata);
    ASSERT_EQ(file.entries().size(), named.size());
    for (std::size_t n = 0; n < named.size(); ++n) {
      const files::OwnedTensor loaded = file.load(named[n].first);
      EXPECT_EQ(loaded.view().dtype, named[n].second.dtype);
      EXPECT_EQ(loaded.view().rank, named[n].second.rank);
      EXPECT_EQ(loaded.view().shape, named[n].second.shape);
      EXPECT_EQ(reinterpret_cast<std::uintptr_t>(loaded.view().data) % 64, 0U);
      EXPECT_EQ(text_of(loaded), text_of(owned[n]));
    }
  }
  EXPECT_EQ(folder.count(), 1U) << "a temporary file stayed behind";
}

TEST(Safetensors, StridedTensorsAreWrittenInOrder) {
  const Folder folder;
  std::vector<float> values(2 * 3 * 4);
  for (std::size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>(i);
  const Tensor dense = Tensor::contiguous(values.data(), DType::kFloat32, {2, 3, 4});
  for (const Tensor& view : {dense.transposed(0, 1), dense.transposed(1, 2), dense.transposed(0, 2)}) {
    files::write_safetensors(folder.file("a"), {{"x", view}});
    const files::OwnedTensor loaded = files::SafetensorsFile::open(folder.file("a")).load("x");
    const auto* read = static_cast<const float*>(loaded.view().data);
    for (std::int64_t i = 0; i < view.shape[0]; ++i) {
      for (std::int64_t j = 0; j < view.shape[1]; ++j) {
        for (std::int64_t k = 0; k < view.shape[2]; ++k) {
          EXPECT_EQ(*read++,
                    values[static_cast<std::size_t>(i * view.strides[0] + j * view.strides[1] + k * view.strides[2])]);
        }
      }
    }
  }
}

TEST(Safetensors, BytesBecomeTruthAndLongLengthsBecomeInt32) {
  const std::string numbers = little_endian(7, 8) + little_endian(static_cast<std::uint64_t>(-2), 8);
  const files::SafetensorsFile file = parse(safetensors(
      R"({"mask":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"n":{"dtype":"I64","shape":[2],"data_offsets":[4,20]}})",
      std::string("\x00\x01\x02\xff", 4) + numbers));
  const files::OwnedTensor mask = file.load("mask");
  EXPECT_EQ(mask.view().dtype, DType::kBool);
  EXPECT_EQ(text_of(mask), std::string("\x00\x01\x01\x01", 4));
  const files::OwnedTensor n = file.load("n");
  EXPECT_EQ(n.view().dtype, DType::kInt32);
  EXPECT_EQ(static_cast<const std::int32_t*>(n.view().data)[0], 7);
  EXPECT_EQ(static_cast<const std::int32_t*>(n.view().data)[1], -2);

  const files::SafetensorsFile large = parse(safetensors(R"({"n":{"dtype":"I64","shape":[1],"data_offsets":[0,8]}})",
                                                         little_endian(std::uint64_t{1} << 31, 8)));
  EXPECT_TRUE(contains(refusal([&] { (void)large.load("n"); }), "2147483648"));
}

TEST(Safetensors, HostileFilesAreRefusedWithTheirNameAndFault) {
  const auto entry = [](const std::string& shape, const std::string& offsets) {
    return R"({"x":{"dtype":"F32","shape":)" + shape + R"(,"data_offsets":)" + offsets + "}}";
  };
  const std::string four(4, '\0');
  std::string deep = R"({"x":)";
  for (int i = 0; i < 100000; ++i) deep += '[';
  const std::vector<std::pair<std::string, std::string>> cases{
      {"", "8 of header length"},
      {"abc", "8 of header length"},
      {little_endian(0, 8), "JSON"},
      {little_endian(1000, 8) + "{}", "announces a header of 1000 bytes"},
      {little_endian(~std::uint64_t{0}, 8) + "{}", "announces a header of 18446744073709551615"},
      {safetensors("{", ""), "valid JSON"},
      {safetensors("[]", ""), "no JSON object"},
      {safetensors("{}", "x"), "belong to no tensor"},
      {safetensors("{\"\xff\":1}", ""), "valid JSON"},
      {safetensors(deep, ""), "nests deeper"},
      {safetensors(R"({"x":1})", ""), "'x'"},
      {safetensors(R"({"x":{}})", ""), "no dtype"},
      {safetensors(R"({"x":{"dtype":"F32"}})", ""), "no shape"},
      {safetensors(R"({"x":{"dtype":"F32","shape":[1]}})", ""), "no data_offsets"},
      {safetensors(R"({"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"more":1}})", four), "unknown key 'more'"},
      {safetensors(entry("[-1]", "[0,4]"), four), "no shape"},
      {safetensors(entry("[1.0]", "[0,4]"), four), "no shape"},
      {safetensors(entry("[1e999]", "[0,4]"), four), "number"},
      {safetensors(entry("[18446744073709551615]", "[0,4]"), four), "no shape"},
      {safetensors(entry("[9223372036854775807,9223372036854775807]", "[0,4]"), four), "larger than any memory"},
      {safetensors(entry("[4611686018427387904]", "[0,0]"), ""), "larger than any memory"},
      {safetensors(entry("[0,9223372036854775807,2]", "[0,0]"), ""), "larger than any memory"},
      {safetensors(entry("[2]", "[0,4]"), four), "has 4 bytes of data, but F32 [2] takes 8"},
      {safetensors(entry("[1]", "[4,0]"), four), "before it begins"},
      {safetensors(entry("[1]", "[0]"), four), "no data_offsets"},
      {safetensors(entry("[2]", "[0,8]"), four), "cut short"},
      {safetensors(entry("[1]", "[4,8]"), four + four), "gap"},
      {safetensors(entry("[1]", "[0,4]"), four + four), "4 bytes of data that belong to no tensor"},
      {safetensors(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},)"
                   R"("b":{"dtype":"F32","shape":[1],"data_offsets":[2,6]}})",
                   four + "ab"),
       "inside another"},
      {safetensors(
           R"({"x":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"x":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}})",
           ""),
       "'x' twice"},
      {safetensors(R"({"x":{"dtype":"F32","dtype":"F16","shape":[0],"data_offsets":[0,0]}})", ""), "'dtype' twice"},
      {safetensors(R"({"__metadata__":[]})", ""), "__metadata__"},
      {safetensors(R"({"__metadata__":{"a":1}})", ""), "'a'"},
      {safetensors(R"({"\u001b[31mred":1})", ""), R"('\x1b[31mred')"},
  };
  for (const auto& [bytes, fault] : cases) {
    const std::string sentence = refusal([&, &bytes = bytes] { (void)parse(bytes); });
    EXPECT_TRUE(sentence.starts_with("name.safetensors: ")) << sentence;
    EXPECT_TRUE(contains(sentence, fault));
    EXPECT_LT(sentence.size(), 400U) << "one sentence";
    EXPECT_EQ(sentence.find('\n'), std::string::npos);
  }
}

TEST(Safetensors, TensorsThatCantBeUsedAreRefusedWhenLoaded) {
  const files::SafetensorsFile file =
      parse(safetensors(R"({"double":{"dtype":"F64","shape":[1],"data_offsets":[0,8]},)"
                        R"("odd":{"dtype":"F8_E9M9","shape":[3],"data_offsets":[8,9]},)"
                        R"("five":{"dtype":"F32","shape":[1,1,1,1,1],"data_offsets":[9,13]},)"
                        R"("scalar":{"dtype":"F32","shape":[],"data_offsets":[13,17]}})",
                        std::string(17, '\0')));
  EXPECT_TRUE(contains(refusal([&] { (void)file.load("double"); }), "tensor 'double': its dtype 'F64' is not read"));
  EXPECT_TRUE(contains(refusal([&] { (void)file.load("odd"); }), "'F8_E9M9'"));
  EXPECT_TRUE(contains(refusal([&] { (void)file.load("five"); }), "5 dimensions"));
  EXPECT_TRUE(contains(refusal([&] { (void)file.load("scalar"); }), "0 dimensions"));
  EXPECT_EQ(refusal([&] { (void)file.load("absent"); }),
            "name.safetensors: tensor 'absent': is not there; the file has 4, from 'double' on");
  EXPECT_TRUE(refusal([] { (void)parse(safetensors("{}", "")).load("absent"); }).ends_with("the file has 0"));
}

TEST(Safetensors, EveryTruncationIsRefused) {
  const Folder folder;
  files::OwnedTensor x(DType::kFloat32, std::vector<std::int64_t>{3, 5});
  files::write_safetensors(folder.file("a"), {{"x", x.view()}, {"y", x.view()}});
  std::ifstream stream(folder.file("a"), std::ios::binary);
  const std::string whole{std::istreambuf_iterator<char>(stream), {}};
  EXPECT_EQ(parse(whole).load("y").bytes().size(), 60U);
  for (std::size_t size = 0; size < whole.size(); ++size) {
    EXPECT_FALSE(refusal([&] { (void)parse(whole.substr(0, size)); }).empty()) << size;
  }
}

TEST(Safetensors, RandomDamageIsRefusedOrReadNeverMore) {
  files::OwnedTensor x(DType::kFloat32, std::vector<std::int64_t>{2, 2});
  const Folder folder;
  files::write_safetensors(folder.file("a"), {{"x", x.view()}}, {{"k", "v"}});
  std::ifstream stream(folder.file("a"), std::ios::binary);
  const std::string whole{std::istreambuf_iterator<char>(stream), {}};
  std::mt19937_64 random(1);
  int refused = 0;
  for (int n = 0; n < 20000; ++n) {
    std::string damaged = whole;
    for (std::uint64_t edits = 1 + random() % 3; edits > 0; --edits) {
      damaged[random() % damaged.size()] = static_cast<char>(random());
    }
    try {
      const files::SafetensorsFile file = parse(damaged);
      for (const auto& [name, entry] : file.entries()) EXPECT_LE(file.load(name).bytes().size(), whole.size());
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kInvalidArgument) << error.what();
      ++refused;
    }
  }
  EXPECT_GT(refused, 1000);
}

TEST(AtomicWriting, LeavesTheOldFileWhereWritingFails) {
  const Folder folder;
  const std::string path = folder.file("a");
  files::write_atomically(path, [](std::ostream& stream) { stream << "old"; });
  EXPECT_THROW(files::write_atomically(path,
                                       [](std::ostream& stream) {
                                         stream << "new";
                                         throw std::runtime_error("midway");
                                       }),
               std::runtime_error);
  EXPECT_THROW(files::write_atomically(path, [](std::ostream& stream) { stream.setstate(std::ios::badbit); }), Error);
  std::ifstream stream(path);
  EXPECT_EQ(std::string(std::istreambuf_iterator<char>(stream), {}), "old");
  EXPECT_EQ(folder.count(), 1U) << "a temporary file stayed behind";
}

TEST(AtomicWriting, OfTwoThreadsAtOnceIsOneOrTheOther) {
  const Folder folder;
  const std::string path = folder.file("a");
  std::barrier both(2);
  const auto write = [&](const std::string& words) {
    files::write_atomically(path, [&](std::ostream& stream) {
      both.arrive_and_wait();
      stream << words;
    });
  };
  std::thread other([&] { EXPECT_NO_THROW(write("the other's")); });
  EXPECT_NO_THROW(write("one's"));
  other.join();
  std::ifstream stream(path);
  const std::string found(std::istreambuf_iterator<char>(stream), {});
  EXPECT_TRUE(found == "one's" || found == "the other's") << found;
  EXPECT_EQ(folder.count(), 1U);
}

TEST(AtomicWriting, RefusesWhatIsNoPlaceForAFile) {
  const Folder folder;
  const auto write = [](const std::string& path) {
    files::write_atomically(path, [](std::ostream& stream) { stream << "x"; });
  };
  EXPECT_TRUE(contains(refusal([&] { write(folder.file("no/such/folder")); }), "can't be written"));
  EXPECT_TRUE(contains(refusal([&] { write(folder.file("")); }), "not a regular file"));
  EXPECT_TRUE(contains(refusal([&] { write("/dev/null"); }), "not a regular file"));
  EXPECT_TRUE(contains(refusal([&] { write(""); }), "empty"));
  write(folder.file("target"));
  std::filesystem::create_symlink("target", folder.file("link"));
  write(folder.file("link"));
  EXPECT_TRUE(std::filesystem::is_symlink(folder.file("link"))) << "the link was replaced, not its target";
}

TEST(AtomicWriting, KeepsWhatStoodThereButTheContent) {
  const Folder folder;
  const auto write = [](const std::string& path) {
    files::write_atomically(path, [](std::ostream& stream) { stream << "x"; });
  };
  std::filesystem::create_symlink("later", folder.file("between"));
  std::filesystem::create_symlink(folder.file("between"), folder.file("link"));
  write(folder.file("link"));
  EXPECT_TRUE(std::filesystem::is_symlink(folder.file("link"))) << "the link was replaced, though its file was to come";
  EXPECT_TRUE(std::filesystem::is_regular_file(std::filesystem::symlink_status(folder.file("later"))));
  std::filesystem::create_symlink("circle", folder.file("circle"));
  EXPECT_TRUE(contains(refusal([&] { write(folder.file("circle")); }), "can't be written"));

  const auto mine = std::filesystem::perms::owner_read | std::filesystem::perms::owner_write;
  std::filesystem::permissions(folder.file("later"), mine);
  write(folder.file("later"));
  EXPECT_EQ(std::filesystem::status(folder.file("later")).permissions(), mine);

  write(folder.file(std::string(255, 'n')));
  EXPECT_TRUE(contains(refusal([&] { files::require_writable(folder.file(std::string(256, 'n'))); }), "too long"));
}

TEST(InputFiles, WhatIsNoFileIsRefused) {
  const Folder folder;
  EXPECT_TRUE(contains(refusal([&] { (void)files::SafetensorsFile::open(folder.file("absent")); }), "No such file"));
  EXPECT_TRUE(contains(refusal([&] { (void)read_npy(folder.file("")); }), "not a regular file"));
}

TEST(Npy, ArraysReadAsTheirBytes) {
  struct Case {
    const char* descr;
    DType dtype;
    std::size_t bytes;
  };
  for (const Case& c :
       {Case{"<f4", DType::kFloat32, 4}, Case{"<f2", DType::kFloat16, 2}, Case{"<V2", DType::kBFloat16, 2},
        Case{"|V2", DType::kBFloat16, 2}, Case{"<i4", DType::kInt32, 4}}) {
    for (int version = 1; version <= 3; ++version) {
      const std::string data = random_bytes(6 * c.bytes, 7);
      const files::OwnedTensor tensor = parse_npy(npy(
          fmt::format("{{'descr': '{}', 'fortran_order': False, 'shape': (2, 3), }}   \n", c.descr), data, version));
      EXPECT_EQ(tensor.view().dtype, c.dtype);
      EXPECT_EQ(tensor.view().rank, 2);
      EXPECT_EQ(tensor.view().shape[1], 3);
      EXPECT_EQ(text_of(tensor), data);
    }
  }
  EXPECT_EQ(text_of(parse_npy(
                npy("{'shape': (3,), 'fortran_order': False, 'descr': '|b1'}", std::string("\x00\x01\x01", 3)))),
            std::string("\x00\x01\x01", 3));
  EXPECT_EQ(text_of(parse_npy(
                npy("{\"descr\": \"|u1\", 'fortran_order': False, 'shape': (2,)}", std::string("\x00\x09", 2)))),
            std::string("\x00\x01", 2));
  EXPECT_EQ(text_of(parse_npy(npy("{'descr': '<i8', 'fortran_order': False, 'shape': (1,)}", little_endian(9, 8)))),
            little_endian(9, 4));
}

TEST(Npy, WhatIsNotUnderstoodIsRefused) {
  const auto with = [](const std::string& descr, const std::string& order, const std::string& shape) {
    return npy("{'descr': " + descr + ", 'fortran_order': " + order + ", 'shape': " + shape + "}",
               std::string(8, '\0'));
  };
  const std::vector<std::pair<std::string, std::string>> cases{
      {"", "no .npy file"},
      {"\x93NUMPX__________", "no .npy file"},
      {npy("{}", "", 9), "version 9"},
      {npy("{'descr'", ""), "not understood"},
      {npy("{}", ""), "must name"},
      {npy("{'descr': '<f4', 'descr': '<f4'}", ""), "twice"},
      {npy("{'colour': '<f4'}", ""), "'colour'"},
      {with("'<f4'", "True", "(2,)"), "Fortran"},
      {with("'<f4'", "None", "(2,)"), "not understood"},
      {with("'>f4'", "False", "(2,)"), "'>f4'"},
      {with("'<f8'", "False", "(1,)"), "'<f8'"},
      {with("[('a', '<f4')]", "False", "(2,)"), "structured"},
      {with("'<f4'", "False", "(-2,)"), "negative"},
      {with("'<f4'", "False", "(3,)"), "has 8 bytes of data"},
      {with("'<f4'", "False", "(1,)"), "has 8 bytes of data"},
      {with("'<f4'", "False", "()"), "bytes of data"},
      {with("'<f4'", "False", "(9223372036854775807, 9)"), "larger than any memory"},
      {with("'<f4'", "False", "(99999999999999999999,)"), "not understood"},
      {with("'<f4'", "False", "(1, 1, 1, 1, 2)"), "5 dimensions"},
      {with("'<f4'", "False", "(2,)").substr(0, 30), "complete"},
      {npy("{'descr': '<f4', 'fortran_order': False, 'shape': (2,)} x", std::string(8, '\0')), "not understood"},
  };
  for (const auto& [bytes, fault] : cases) {
    const std::string sentence = refusal([&, &bytes = bytes] { (void)parse_npy(bytes); });
    EXPECT_TRUE(sentence.starts_with("name.npy: ")) << sentence;
    EXPECT_TRUE(contains(sentence, fault));
  }
  const std::string whole = with("'<f4'", "False", "(2,)");
  for (std::size_t size = 0; size < whole.size(); ++size) {
    EXPECT_FALSE(refusal([&] { (void)parse_npy(whole.substr(0, size)); }).empty()) << size;
  }
}

}  // namespace
}  // namespace fovea::tools
